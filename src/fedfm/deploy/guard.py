"""What a coordinator adds to each message, sees in each reply, and writes into its audit log."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedfm.deploy.seal import Seal
from fedfm.store.files import writing
from fedfm.wire.admit import brief


@dataclass
class Guard:
    """The coordinator's side of sealed messages.

    Args:
        seal: its key and the sites' public keys.
        common: what every message bears: run, recipe, number of members, names of classes.
        log: the audit log, one JSON object a line; only ever appended to.
        now: nanoseconds since 1970.
    """

    seal: Seal
    common: Mapping[str, Any]
    log: Path
    now: Callable[[], int] = time.time_ns
    _sent: int = field(default=0, init=False)

    def close(self, kind: str, settings: Mapping[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
        """The settings with what all messages bear, and the signature.

        ``sent`` only grows, also over restarts as long as the clock does, so a site can refuse what it saw before.
        """
        self._sent = max(self._sent + 1, self.now())
        whole = {**settings, **self.common, "sent": self._sent}
        return whole, self.seal.sign(kind, whole, content)

    def open(
        self, client: str, signature: object, settings: Mapping[str, Any], content: bytes, answered: bytes
    ) -> None:
        """See that a reply is the client's, to this message.

        Raises:
            BadUpdate: it is not.
        """
        self.seal.verify(client, signature, "reply", settings, content, answered)

    def note(self, verdict: str, **what: Any) -> None:
        """Add a line to the audit log; reasons, which others may have written, are cut to a line."""
        if "reason" in what:
            what["reason"] = brief(what["reason"])
        line = {"time": self.now() / 1e9, "run": self.common["run"], "verdict": verdict, **what}
        with writing(self.log), self.log.open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")
