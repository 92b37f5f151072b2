"""The claim of every published method, by its id: what its paper says, and where and against what it is tried here.

Settings of methods are the defaults of their classes. Where a claim needs others, they are chosen once and for all
seeds, before the result is known.
"""

from __future__ import annotations

from typing import Any

from benchmarks.fidelity.claim import Claim

FEW = "The budget is small: a few rounds of a small model, where all methods are still close together."
SERVER = "The server's learning rate is the class's default and was not searched for, which these rules need most."
OWN_TESTS = (
    "Clients are scored on test rows of their own few classes, which a model of their own fits without the others."
)
FEW_LIARS = "Three of ten clients with wrong labels do the mean little harm in so few rounds of a frozen encoder."
RANKS = "With four classes and headlines, rank 2 is nearly enough: there is little that higher ranks could add."

ONE_RANK: dict[str, Any] = {"method": "fedit", "space": {"r": 2, "lora_alpha": 4}, "profiles": {}}
"""All clients as the weakest; the factor alpha / r is that of the scenario."""
PRIVATE = {"sampler": {"kind": "poisson", "rate": 0.5}}

UNTRIED: dict[str, str] = {
    "gtg-shapley": "Its claim is about clients' values, not about a model; its tests hold it against exact values.",
}
"""What is published here without a claim that two runs could show, and why."""

CLAIMS: dict[str, Claim] = {
    # References.
    "fedavg": Claim(
        "Many fewer rounds than FedSGD to the same accuracy.",
        "agnews-sgd",
        against={"method": "fedsgd"},
        note=FEW,
    ),
    "fedsgd": Claim(
        "Where traffic does not count, exact gradients in four times as many rounds reach what FedAvg reaches.",
        "agnews-sgd",
        run={"rounds": 120},
        expect="near",
        within=0.03,
        note="Its steps are exact but as few as its rounds; the learning rate was not raised for them.",
    ),
    "local-only": Claim(
        "A lower bound: each client alone is worse than FedAvg.", "agnews-iid", expect="worse", note=OWN_TESTS
    ),
    "centralised": Claim("An upper bound: all data in one place is better than FedAvg.", note=FEW),
    # Optimisation.
    "fedprox": Claim(
        "More accurate than FedAvg where data are skewed and some clients do part of the work.", "stragglers"
    ),
    "feddyn": Claim("Fewer rounds than FedAvg at Dirichlet 0.3: more accurate after as many.", "agnews-sgd"),
    "scaffold": Claim("Fewer rounds than FedAvg where data are skewed: more accurate after as many.", "agnews-sgd"),
    "fednova": Claim("More accurate than FedAvg where clients do different numbers of local steps.", "stragglers"),
    "feddc": Claim("More accurate than FedAvg with skewed data and partial participation.", "agnews-sgd"),
    "fedadagrad": Claim("More accurate than FedAvg on text after as many rounds.", "agnews-sgd", note=SERVER),
    "fedadam": Claim("More accurate than FedAvg after as many rounds.", "agnews-sgd", note=SERVER),
    "fedyogi": Claim("More accurate than FedAvg after as many rounds.", "agnews-sgd", note=SERVER),
    "fedavgm": Claim("Far more accurate than FedAvg where labels are skewed.", "agnews-sgd", note=SERVER),
    "fedpaq": Claim(
        "Quantised changes converge like exact ones, at a fraction of the traffic.",
        "agnews-sgd",
        expect="near",
        within=0.02,
        bytes_up=0.35,
        note="The coarser the quantiser, the more rounds its noise takes to average out; there are few.",
    ),
    # LoRA.
    "fedit": Claim(
        "Tuning together beats each client's own tuning, on held-out dialogues of all.",
        "dialogues",
        against={"method": "local-only"},
        metric="loss",
        note=OWN_TESTS,
    ),
    "ffa-lora": Claim(
        "As good as LoRA averaged factor by factor where labels are skewed, at half the traffic.",
        against={"method": "fedit"},
        expect="near",
        within=0.02,
        bytes_up=0.6,
        note="With the A factors fixed at random values, B needs more steps than there are here.",
    ),
    "fedsa-lora": Claim(
        "Better for the clients than FedIT under label skew, as each keeps its own B.",
        against={"method": "fedit"},
        metric="mean accuracy",
        note="A client that is asked in half of the rounds trains its own B in few steps.",
    ),
    "flora-stacking": Claim(
        "Exact aggregation beats truncated and zero-padded factors where ranks differ.",
        "ranks",
        against={"method": "hetlora"},
        note="It begins new factors each round, which lose the optimizer's way; this weighs more in short rounds.",
    ),
    "flexlora": Claim("Better than FedIT at the rank of the weakest client.", "ranks", against=ONE_RANK, note=RANKS),
    "hetlora": Claim("Better than LoRA of one low rank for all.", "ranks", against=ONE_RANK, note=RANKS),
    "feddpa": Claim(
        "Better for the clients than FedIT, as each has an adapter of its own beside the global one.",
        against={"method": "fedit"},
        metric="mean accuracy",
        note="Its steps are shared between two adapters, so that each has fewer.",
    ),
    "rolora": Claim(
        "Keeps its accuracy where the rank is 1, while LoRA averaged factor by factor loses points.",
        both={"space": {"r": 1, "lora_alpha": 4}},
        against={"method": "fedit"},
        note="Each factor is trained in half of the rounds, and there are few; here clients are few, too.",
    ),
    # Asynchronous: ten synchronous rounds take the slowest client ten units of simulated time; 100 uploads arrive
    # within 3.3 to 4.5 units one by one, and within 5.2 to 9.3 in buffers of five.
    "fedasync": Claim(
        "In less simulated time than ten synchronous rounds, at least their accuracy.",
        "speeds",
        run={"rounds": 100},
        expect="near",
        within=0.0,
        note="Each upload moves the model alone and by a share, so that the skew of the last clients shows.",
    ),
    "fedbuff": Claim(
        "In less simulated time than ten synchronous rounds, at least their accuracy.",
        "speeds",
        run={"method": {"kind": "fedbuff", "buffer": 5}, "rounds": 20},
        expect="near",
        within=0.0,
        note="Fast clients send more often than slow ones, and the skew of their labels with it.",
    ),
    # Merging.
    "model-soup-uniform": Claim(
        "The average of separately tuned models beats the models it is made of.",
        "one-shot",
        against={"method": "local-only"},
        note="A soup needs ingredients in one valley; with a new classifier and few rows they may lie apart.",
    ),
    "model-soup-greedy": Claim(
        "Leaving out ingredients that do not help beats the plain average where some clients are bad.",
        "liars",
        both={"rounds": 1, "training": {"max_steps": 24}},
        against={"method": "model-soup-uniform"},
        note="With few held-out rows the choice of ingredients is uncertain.",
    ),
    "model-ratatouille": Claim(
        "Starting from models of other tasks beats the plain soup.",
        "one-shot",
        against={"method": "model-soup-uniform"},
        note="Paper and gain are about images of an unseen domain; half of its steps go into the other tasks.",
    ),
    "learned-routing-aggregation": Claim(
        "Learned weights of clients beat FedAvg's where some clients are bad.", "liars", note=FEW_LIARS
    ),
    "fedma": Claim(
        "One-shot matching of neurons beats averaging weight by weight.",
        "one-shot",
        both={"space": "full", "training": {"learning_rate": 1e-4}},
        note="All clients start from one pretrained model, so their neurons are matched before the method begins.",
    ),
    # Data and prompts.
    "data-sharing": Claim(
        "A few rows that all clients have make up for extreme label skew.",
        "banking",
        note="64 rows of 12 classes are about five of each, seen beside the client's own in as many steps.",
    ),
    "fedbpt": Claim(
        "Without gradients, competitive with federated prompt tuning, at a fraction of the traffic.",
        "prompt",
        run={"method": {"kind": "fedbpt", "local_iterations": 4, "population": 5}, "rounds": 3},
        expect="near",
        within=0.05,
        bytes_up=0.5,
        note="The paper takes 200 rounds of 8 generations of 20; evolution finds little in 3 of 4 generations of 5.",
    ),
    "pfedpg": Claim(
        "Prompts made for each client beat one prompt for all, for the clients.",
        "prompt",
        metric="mean accuracy",
        note="The generator learns from fifteen rounds; the paper takes a hundred.",
    ),
    # Other exchanges.
    "fedkseed": Claim(
        "As good as tuning LoRA together, with kilobytes a round.",
        run={
            "rounds": 3,
            "space": "full",
            "training": {"learning_rate": 1e-6, "per_device_train_batch_size": 1, "max_steps": 20},
        },
        against={"method": "fedit"},
        expect="near",
        within=0.05,
        bytes_up=0.5,
        note="The paper takes 200 steps in each of 40 rounds from a model that knows the task; here there are 20 in 3.",
    ),
    "fedbert": Claim(
        "Pre-training split between clients and server comes near to central pre-training.",
        "masked",
        against={"method": "centralised"},
        metric="loss",
        expect="near",
        within=0.3,
        note="From random weights, a few dozen steps leave all near the loss of guessing by frequency.",
    ),
    "fedmd": Claim(
        "Clients that learn from each other's scores beat clients alone.",
        against={"method": "local-only"},
        metric="mean accuracy",
        note=OWN_TESTS,
    ),
    # Stages.
    "qsgd": Claim(
        "Large cuts of traffic at little loss.",
        run={"method": "fedavg", "stages": [{"kind": "qsgd", "levels": 7}]},
        expect="near",
        within=0.02,
        bytes_up=0.35,
        note="One norm for each tensor makes the rounding coarse.",
    ),
    "topk": Claim(
        "A tenth of the coordinates, with what is left out sent later, costs little.",
        run={"method": "fedavg", "stages": [{"kind": "topk", "fraction": 0.1}]},
        expect="near",
        within=0.02,
        bytes_up=0.25,
        note="What is left out waits for the client's next turn; in few rounds it may not come.",
    ),
    "gaussian": Claim(
        "Guarantees for each client at little loss, given very many clients.",
        both=PRIVATE,
        run={
            "method": "fedavg",
            "stages": [{"kind": "clip", "max_norm": 1.0}, {"kind": "gaussian", "noise_multiplier": 1.0}],
        },
        expect="near",
        within=0.05,
        note="The noise is divided among four clients a round; the paper's guarantee takes thousands.",
    ),
    # Estimators and screens.
    "median": Claim(
        "The median coordinate by coordinate withstands clients with wrong labels.",
        "liars",
        run={"method": "fedavg", "mean": "median"},
        note=FEW_LIARS,
    ),
    "trimmed-mean": Claim(
        "The mean without the outermost values withstands clients with wrong labels.",
        "liars",
        run={"method": "fedavg", "mean": {"kind": "trimmed-mean", "count": 3}},
        note=FEW_LIARS,
    ),
    "krum": Claim(
        "The upload nearest to the others withstands clients with wrong labels.",
        "liars",
        run={"method": "fedavg", "screens": [{"kind": "krum", "hostile": 3}]},
        note="It uses one client's upload a round, which costs more than the wrong labels of three do.",
    ),
    "multi-krum": Claim(
        "The mean of the uploads nearest to the others learns faster than Krum where labels are wrong.",
        "liars",
        run={"method": "fedavg", "screens": [{"kind": "multi-krum", "hostile": 3}]},
        against={"screens": [{"kind": "krum", "hostile": 3}]},
        note=FEW_LIARS,
    ),
}
