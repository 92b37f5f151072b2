"""A client's steps by TRL's ``SFTTrainer``, as the federated scripts that build on it do them.

The trainer is made anew for each client and round, on a peft model that stays. What differs from the trainer's own
defaults: the order of the examples is that of the job, the learning rate is constant, and bfloat16 and gradient
checkpointing, which this release switches on, are off, as both cost time here; nothing is logged or saved.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from work import Example, Work


def train(work: Work, model: Any, tokenizer: Any, batches: list[list[Example]], scratch: str) -> float:
    """Train; the mean loss over the steps.

    Args:
        work: the job.
        model: the peft model, changed in place.
        tokenizer: of the model.
        batches: the examples of each step.
        scratch: folder that the trainer is told to write to; nothing is.
    """
    size = work.training["per_device_train_batch_size"]
    if {len(batch) for batch in batches} != {size}:
        raise ValueError(f"SFTTrainer takes examples in an order, so every batch must have {size} of them")
    settings = SFTConfig(
        output_dir=scratch,
        max_steps=len(batches),
        per_device_train_batch_size=size,
        learning_rate=work.training["learning_rate"],
        weight_decay=work.training["weight_decay"],
        max_grad_norm=work.training["max_grad_norm"],
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = Dataset.from_list([example for batch in batches for example in batch])
    trainer = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
    return float(trainer.train().training_loss)
