"""The claim of every published method, by its id: what its paper says, and where and against what it is tried here.

Settings of methods are the defaults of their classes. Where a claim needs others, they are chosen once and for all
seeds, before the result is known.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.fidelity.claim import Claim
from fedfm import parts

FEW = "The budget is small: a few rounds of a small model, where all methods are still close together."
SERVER = "The server's learning rate is the class's default and was not searched for, which these rules need most."
OWN_TESTS = (
    "Clients are scored on test rows of their own few classes, which a model of their own fits without the others."
)
FEW_LIARS = "Three of ten clients with wrong labels do the mean little harm in so few rounds of a frozen encoder."
RANKS = "With four classes and headlines, rank 2 is nearly enough: there is little that higher ranks could add."

ONE_RANK: dict[str, Any] = {"method": "fedit", "space": {"r": 2, "lora_alpha": 4}, "profiles": {}}
"""All clients as the weakest; the factor alpha / r is that of the scenario."""
BESIDE: dict[str, Any] = {"kind": "full-lora", "r": 4, "lora_alpha": 16, "layers_to_transform": [5]}
"""The space of the scenarios on headlines, with the weights beside the factors."""
HALVED: dict[str, Any] = {**BESIDE, "r": 192, "lora_alpha": 192}
"""The same with factors of up to half the layers' width, of the scale 1."""
EXAMPLES = {"kind": "dp-sgd", "target_epsilon": 6.0, "delta": 1e-3}
CLIPPED = {"kind": "clip", "max_norm": 0.5}
SPENT = {"target_epsilon": 20.0, "delta": 1e-3, "accountant": "rdp"}
PRIVATE = {"sampler": {"kind": "poisson", "rate": 0.5}}

TURNED: dict[str, Any] = {"kind": "sign-flip", "clients": 0.17}
"""Two of twelve clients send the opposite of what they found, four times as long."""
HIDDEN: dict[str, Any] = {"kind": "alie", "clients": 0.17, "z": 1.5, "sees": "omniscient"}
"""Two of twelve send what lies just within the spread of the honest ones."""
WANTED: dict[str, Any] = {"clients": 0.17, "target": 2, "share": 0.5}
"""Two of twelve want rows with a trigger taken for another class."""
COPIES: dict[str, Any] = {"kind": "duw", "marks": 48}
"""With four classes 43 of 48 marks have to match; a hundred for each client take longer to teach."""
SMALL = (
    "An adapter of rank 4 in one block learns a hundred rows of nonsense by heart beside its task; the papers' "
    "networks are trained as a whole, for hundreds of rounds."
)
NOISE = "In sixty rounds from a new head the gradients themselves are still large beside their noise."


def _bears(what: str, share: float = 0.17, **part: Any) -> Claim:
    """Claims that a rule learns where the mean does not, as some clients send the opposite of what they found."""
    return Claim(
        f"{what} bears clients who send the opposite: more accurate than the mean.",
        "attacked",
        both={"threat": {**TURNED, "clients": share}},
        run={"method": "fedavg", **part},
        note=FEW,
    )


def _stops(kind: str, what: str, **part: Any) -> Claim:
    """Claims that a rule makes a backdoor succeed less often."""
    return Claim(
        f"{what} stops a backdoor ({kind}) more often than the mean does.",
        "attacked",
        both={"threat": {"kind": kind, **WANTED}},
        run={"method": "fedavg", **part},
        metric="attack_success",
        note="Two hostile clients in every round are many for a backdoor; the paper's are few or seldom there.",
    )


UNTRIED: dict[str, str] = {
    "adaptive-clip": "Its claim is that no bound need be searched for; its tests see that it finds its quantile.",
    "tree-gaussian": "Its claim is about thousands of rounds and millions of clients; its tests hold its noise and its "
    "account against those worked out by hand.",
    "gtg-shapley": "Its claim is about clients' values, not about a model; its tests hold it against exact values.",
}
"""What is published here without a claim that two runs could show, and why."""
ELSEWHERE = {
    "audit": "What it learns of rows, with and without protection, stands in audits-measured.md.",
    "attack": "What it does to the mean and to defences stands in attacks-measured.md.",
    "dedup": "It changes rows, not how a method learns from them; deduplication.md has it measured.",
    "unlearning": "It works on a run that was made; unlearning.md has it measured beside exact retraining.",
    "secure": "It changes no result but by rounding; its tests hold sums bit for bit, its costs are measured.",
}
"""The same of all that is in a folder."""
UNTRIED |= {cls.id: ELSEWHERE[folder] for folder, cls in parts.published() if folder in ELSEWHERE}
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
    "ffa-lora-private": Claim(
        "Better than LoRA averaged factor by factor where the mean has noise for an epsilon of 8 for clients: noise on "
        "one factor stays noise of the same size in the product.",
        both={
            "sampler": {"kind": "poisson", "rate": 0.5},
            "stages": [
                {"kind": "clip", "max_norm": 0.5},
                {"kind": "gaussian", "target_epsilon": 8.0, "delta": 1e-2},
            ],
        },
        run={"method": "ffa-lora"},
        against={"method": "fedit"},
        note="The noise is divided among four clients a round, so it hides most of what either method learns; the "
        "paper adds noise to the gradients of single examples, of which there are thousands.",
    ),
    "ffa-lora-examples": Claim(
        "Better than LoRA averaged factor by factor where each client trains by DP-SGD for an epsilon of 6: noise on "
        "one factor stays noise of the same size in the product.",
        "private",
        both={"privacy": EXAMPLES},
        run={"method": "ffa-lora"},
        against={"method": "fedit"},
        note="The paper's clients have tens of thousands of rows, and its learning rates are searched for each method "
        "and epsilon. In twenty steps the product of the noise on both factors is small.",
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
    "federa": Claim(
        "More accurate than LoRA from random factors after as many rounds where labels are skewed.",
        against={"method": "fedit"},
        note="One block of a small encoder is tuned, of rank 4; most of what is learnt is the new head, in both.",
    ),
    "lora-fair": Claim(
        "More accurate than LoRA averaged factor by factor, at the same traffic.",
        against={"method": "fedit"},
        bytes_up=1.01,
        note="After a few local steps the clients' A hardly differ, so the mean of the products is near the product of "
        "the means and there is little to correct; the paper gains a point in 50 rounds of 2 epochs.",
    ),
    "flasc": Claim(
        "A quarter of the entries on either way costs little against dense LoRA with the same rule on the server.",
        "agnews-sgd",
        against={"method": {"kind": "flasc", "density_down": 1.0, "density_up": 1.0}},
        expect="near",
        within=0.02,
        bytes_up=0.35,
        note="The server's rate is the default of the paper's code and was not searched for.",
    ),
    "sa-fedlora": Claim(
        "As good as LoRA of the full rank in all rounds, with fewer bytes.",
        both={"space": {"r": 8, "lora_alpha": 32}},
        against={"method": "fedit"},
        expect="near",
        within=0.02,
        bytes_up=0.7,
        note="Ranks are dropped from the seventh of thirty rounds on, when what they are for is hardly known yet.",
    ),
    "fedpetuning-fedlr": Claim(
        "Within a few points of tuning the whole model, at a hundredth of the traffic.",
        run={"rounds": 5, "training": {"max_steps": 12}},
        against={"rounds": 5, "space": "full", "training": {"max_steps": 12, "learning_rate": 1e-4}},
        expect="near",
        within=0.05,
        bytes_up=0.02,
        note="The scenario tunes factors in one block of six; the whole model moves all of them in each step.",
    ),
    "fedmentalcare": Claim(
        "Tuned together, the encoder comes near to one tuned on all texts in one place.",
        "agnews-iid",
        against={"method": "centralised"},
        expect="near",
        within=0.05,
        note="One place takes as many steps as all clients together, one after the other.",
    ),
    "rbla": Claim(
        "Better than factors filled up with zeros, as low ranks do not shrink high ones.",
        "ranks",
        against={"method": "hetlora"},
        note=RANKS,
    ),
    "lora-replication-padding": Claim(
        "Better than factors filled up with zeros, where few clients have the high rank.",
        "ranks",
        both={"profiles": {"rank": (2, 2, 8)}},
        against={"method": "hetlora"},
        note=RANKS,
    ),
    "lora-a2": Claim(
        "Where labels are skewed, better than FFA-LoRA of rank 1 that sends as much.",
        "blocks",
        run={"space": {"r": 8, "lora_alpha": 32}, "profiles": {"rank": (1,)}},
        against={"method": "ffa-lora", "space": {"r": 1, "lora_alpha": 4}},
        bytes_up=1.1,
        note="A is trained in half of the rounds, and there are few; each round has a step that only measures.",
    ),
    "fedra": Claim(
        "Near to LoRA on the whole model at less traffic, though nobody can hold all of it.",
        "blocks",
        run={"profiles": {"blocks": (2, 3, 4)}},
        against={"method": "fedit"},
        expect="near",
        within=0.05,
        bytes_up=0.7,
        note="A model of half of its blocks, without training for it, works badly: clients tune it under other inputs.",
    ),
    "fed-pilot": Claim(
        "Better than FedRA, which draws blocks by chance, with about as many of them.",
        "blocks",
        run={"profiles": {"memory": (0.4, 0.6, 0.8)}},
        against={"method": "fedra", "profiles": {"blocks": (2, 4, 5)}},
        note="Gains are measured on the client's few rows; with six blocks and rank 4 most choices are good enough.",
    ),
    "fedlfc": Claim(
        "One adapter for each family of languages is better for the clients than one for all.",
        "languages",
        against={"method": "fedit"},
        metric="mean loss",
        note="In few rounds, what all languages teach alike, the form of a dialogue, counts more than their conflicts.",
    ),
    "fl-tac": Claim(
        "Adapters of single tasks, clustered by value, beat one adapter for all tasks.",
        "tasks",
        run={"method": {"kind": "fl-tac", "clusters": 3, "column": "task"}},
        against={"method": "fedit"},
        metric="mean accuracy",
        note="In the first rounds adapters hardly differ, and who falls into a wrong cluster receives its mean.",
    ),
    "slora": Claim(
        "Better than LoRA that starts at random where labels are skewed, at no more traffic.",
        run={"method": {"kind": "slora", "sparse": 0.25}, "space": BESIDE},
        against={"method": "fedit"},
        bytes_up=1.0,
        note="Eight rounds of four steps move a hundredth of two weights by little, and 22 are left for LoRA.",
    ),
    "fedlora-wu": Claim(
        "Better for the clients than FedAvg of the same weights, as each has a low-rank part of its own beside them.",
        both={"space": BESIDE, "training": {"max_steps": 5}},
        run={"method": {"kind": "fedlora-wu", "personal_steps": 2}, "training": {"max_steps": 3}},
        against={"method": {"kind": "fedlora-wu", "personal_steps": 0}},
        metric="mean accuracy",
        note="The head, which skewed labels pull apart most, is shared; two of five steps go into the factors.",
    ),
    "fedhm": Claim(
        "Clients of several ranks together beat all clients at the rank of the weakest.",
        "ranks",
        both={"space": HALVED},
        run={"profiles": {"rank": (48, 96, 192)}},
        against={"method": "fedhm", "profiles": {"rank": (48,)}},
        note="Two weights of one layer are factored; the head above them can make up for what a low rank leaves out.",
    ),
    "fdlora": Claim(
        "A personal and a global adapter, weighted on a few rows, are better for the clients than one for all.",
        against={"method": "fedit"},
        metric="mean accuracy",
        note="The weights are found on a few validation rows; the outer learning rate is that of long local work.",
    ),
    "perfit": Claim(
        "Entries that each client chooses from a rank twice as large beat FedIT with as many parameters.",
        "dialogues",
        run={"space": {"r": 8, "lora_alpha": 32}},
        against={"method": "fedit"},
        metric="mean loss",
        note="Three clients share few entries, so that each learns much alone; entries are chosen after four steps.",
    ),
    "offsite-tuning": Claim(
        "Blocks tuned around an emulator and plugged around the full middle come near to tuning all blocks together.",
        "blocks",
        against={"method": "fedit"},
        expect="near",
        within=0.05,
        bytes_up=0.8,
        note="Of six blocks four are tuned and one of the two between them is dropped, without distillation: the ends "
        "are tuned to make up for what is missing, which then is not.",
    ),
    "fedbiot": Claim(
        "Better than Offsite-Tuning of as many blocks with as deep an emulator, which nobody aligns.",
        "blocks",
        run={"method": {"kind": "fedbiot", "drop": 0.5}},
        against={"method": {"kind": "offsite-tuning", "ends": 1, "keep": 0.5}},
        note="Two of four blocks below the adapter are dropped; 64 public rows and factors of rank 4 in two blocks can "
        "do little about that, and Offsite-Tuning may change the first block, where it is felt most.",
    ),
    "fedpeat": Claim(
        "Near to tuning the whole model together, with a fifth of the traffic, on devices of three sizes.",
        "blocks",
        both={"rounds": 5},
        run={"training": {"max_steps": 12}, "profiles": {"blocks": (4, 5, 6)}},
        against={"space": "full", "training": {"max_steps": 12, "learning_rate": 1e-4}},
        expect="near",
        within=0.05,
        bytes_up=0.2,
        note="Factors of four blocks of six are tuned, on two of three devices around a middle that lacks blocks.",
    ),
    "dp-lora": Claim(
        "With a guarantee for each example, within a few points of FedIT at the same traffic.",
        run={"method": {"kind": "dp-lora", "noise_multiplier": 3.0, "delta": 1e-3}},
        against={"method": "fedit"},
        expect="near",
        within=0.05,
        bytes_up=1.01,
        note="Clients have 14 to 78 rows, so an epsilon of 8 at a delta of 0.001 for who takes part in every round "
        "takes three times the usual noise; the paper's clients have thousands.",
    ),
    "dp-lora-examples": Claim(
        "With a guarantee for each example at an epsilon of 6, within a few points of LoRA without noise.",
        "private",
        run={"method": {"kind": "dp-lora", "target_epsilon": 6.0, "delta": 1e-3}},
        against={"method": "fedit"},
        expect="near",
        within=0.1,
        bytes_up=1.01,
        note="275 rows a client and 20 steps; the paper's clients have thousands of rows.",
    ),
    "dp-bitfit": Claim(
        "Near DP-LoRA at the same epsilon with fewer numbers: biases alone are enough.",
        "private",
        run={"method": {"kind": "dp-bitfit", "target_epsilon": 6.0, "delta": 1e-3}, "space": "bitfit"},
        against={
            "method": {"kind": "dp-lora", "target_epsilon": 6.0, "delta": 1e-3},
            "space": {"kind": "lora", "r": 4, "lora_alpha": 16},
        },
        expect="near",
        within=0.02,
        bytes_up=0.8,
        note="Both have the learning rate of the scenario; biases are commonly given a larger one.",
    ),
    "fedmem": Claim(
        "A memory of the client's own rows beside the global model is better for the clients than that model alone.",
        "dialogues",
        against={"method": "fedit"},
        metric="mean loss",
        note="Six dialogues a client are a small memory, and its temperature is that of larger models.",
    ),
    "pfeds2t": Claim(
        "A memory of the speaker's own recordings makes fewer word errors than the model tuned together alone, at no "
        "traffic.",
        "speech",
        against={"method": "fedit"},
        metric="mean wer",
        bytes_up=1.01,
        note="A vote of a quarter changes only letters about which the model is nearly undecided, and what it mishears "
        "lies elsewhere among the states than the same word heard rightly.",
    ),
    # Rank 1 and a quarter of the batch on half of the matrices is what the smallest of these budgets pays for.
    "fedpipe": Claim(
        "Clients that tune what matters most to them within their memory beat all at what the weakest affords.",
        "blocks",
        run={"method": {"kind": "fedpipe", "positions": 192}, "profiles": {"memory": (0.125, 0.25, 0.5, 1.0)}},
        against={
            "method": "fedit",
            "space": {"r": 1, "lora_alpha": 4, "layers_to_transform": [3, 4, 5]},
            "training": {"per_device_train_batch_size": 2},
        },
        note="A client's few rows say little of which matrices matter, and one that few tune is left to these alone.",
    ),
    "fedhds": Claim(
        "Trained on a few rows that stand for the others, better on topics that nobody has than trained on all rows.",
        "unseen",
        against={"method": "fedit"},
        metric="loss",
        note="24 short dialogues of a client are hardly redundant, and three passes over them do not overfit: what any "
        "topic teaches, the form of a dialogue, is learnt better from all of them.",
    ),
    "lp-fl": Claim(
        "With 16 labelled rows a client and a pool without labels, LoRA on a cloze beats full tuning on it.",
        "few-shot",
        against={"method": "lp-fl", "space": "full", "training": {"learning_rate": 1e-4}},
        bytes_up=0.02,
        note="Forty steps of a small model overfit little either way, and LoRA is in one block of six; the head for "
        "masked words is weak, so that soft labels are often wrong, for both.",
    ),
    # With mu 0 each client trains its own model alone, so the two differ in nothing but the exchange.
    "pfedlora": Claim(
        "Clients whose models differ in depth are better with an adapter between them than each alone.",
        "banking",
        both={"space": {"kind": "lora", "r": 4, "lora_alpha": 16}, "profiles": {"blocks": (4, 5, 6)}, "rounds": 12},
        against={"method": {"kind": "pfedlora", "mu": 0.0}},
        metric="mean accuracy",
        note=f"{OWN_TESTS} The paper takes hundreds of rounds of networks that start from random weights; here they "
        "have one pretrained model in common from the start, and clients see a few dozen rows.",
    ),
    "flora-vlm": Claim(
        "With few images of two classes a client, LoRA in the text tower beats full tuning, and sends far less.",
        "digits",
        against={"method": "fedavg", "space": "full", "training": {"learning_rate": 3e-4}},
        bytes_up=0.1,
        note="The model is so small that full tuning mends its image tower, too, which in a large one needs less of "
        "it. The learning rate of full tuning was not searched for.",
    ),
    "flora-vlm-zero-shot": Claim(
        "LoRA in the text tower beats the pretrained model by its class names alone (a learning rate of 1e-30).",
        "digits",
        run={"method": "flora-vlm"},
        against={"method": "flora-vlm", "rounds": 1, "training": {"learning_rate": 1e-30}},
        note="The texts of all classes move with the two classes of a client, and a few rounds may not even that out.",
    ),
    # Four rows of at most 24 tokens a round are what a run on one core can wait for.
    "fedpit": Claim(
        "With few rows a client, rows that the model writes itself and two adapters beat FedIT for the clients.",
        "dialogues",
        run={"method": {"kind": "fedpit", "prompts": 4, "max_new_tokens": 24}},
        against={"method": "fedit"},
        metric="mean loss",
        note="A model of 135M parameters writes nonsense, and half of what travels is learnt from it; clients are "
        "scored with the adapter that they trained last, on six dialogues of their own, which can help or overfit.",
    ),
    "fedamole": Claim(
        "Better for the clients than FedIT where tasks differ, as experts choose the clients whose data suit them.",
        "tasks",
        run={"space": {"kind": "experts", "r": 4, "lora_alpha": 16, "layers_to_transform": [5], "experts": 27}},
        against={"method": "fedit"},
        metric="mean accuracy",
        note="Experts change clients in each of 12 rounds, and the new head, which all share, does most of the work.",
    ),
    "fedms": Claim(
        "A frozen global expert, a local one and a gate are better for clients of few classes than LoRA for all.",
        "banking",
        both={"space": {"kind": "lora", "r": 4, "lora_alpha": 16}, "rounds": 16},
        run={"space": {"kind": "experts", "r": 4, "lora_alpha": 16, "experts": 2}},
        against={"method": "fedit"},
        metric="mean accuracy",
        note="The global expert has half of the rounds, and few blocks at first; after them the new head is at rest.",
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
    "fedbrb": Claim(
        "With clients of a quarter of the width, better than FedRolex, which rolls along the diagonal alone.",
        "small-to-large",
        against={"method": {"kind": "fedbrb", "rolls": "diagonal", "broadcast": 0.0}},
        note="The baseline is the same code without broadcast, rolling by whole blocks. From random weights, in 32 "
        "rounds, both are at chance. A trial of 48 rounds with another seed, before the claim was written, ended at "
        "0.386 against 0.253.",
    ),
    "fedmd": Claim(
        "Clients that learn from each other's scores beat clients alone.",
        against={"method": "local-only"},
        metric="mean accuracy",
        note=OWN_TESTS,
    ),
    "nbafl": Claim(
        "By its account of a fixed epsilon there is a best number of rounds: a longer run is worse, as the server adds "
        "noise for each round.",
        "agnews-iid",
        run={"method": {"kind": "nbafl", "max_norm": 2.0}},
        against={"method": {"kind": "nbafl", "max_norm": 2.0}, "rounds": 40},
        note="Ten rounds against forty, at the paper's epsilon of 50.",
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
    "distributed-gaussian": Claim(
        "Noise that clients add to what is summed unseen costs little more than noise that a trusted server adds, at "
        "one epsilon.",
        "crowd",
        run={
            "method": "fedavg",
            "stages": [CLIPPED, {"kind": "distributed-gaussian", **SPENT}],
            "secure": {"kind": "secagg"},
        },
        against={"method": "fedavg", "stages": [CLIPPED, {"kind": "gaussian", **SPENT}]},
        expect="near",
        within=0.05,
        note="All come, so the noise is 1.2 times that of the server.",
    ),
    "dynamic-gaussian": Claim(
        "Noise that falls from round to round is better than the same noise in all rounds, at one epsilon.",
        "crowd",
        run={"method": "fedavg", "stages": [CLIPPED, {"kind": "dynamic-gaussian", "decay": 0.8, **SPENT}]},
        against={"method": "fedavg", "stages": [CLIPPED, {"kind": "gaussian", **SPENT}]},
        note="There are five rounds, and the first has 1.6 times the noise that it would have; the paper has thousands "
        "of steps.",
    ),
    "dp-sgd": Claim(
        "Guarantees for each example at a modest loss.",
        "agnews-iid",
        run={"method": "fedavg", "privacy": {"kind": "dp-sgd", "noise_multiplier": 1.5, "delta": 1e-3}},
        expect="near",
        within=0.1,
        note="Clients have some 40 rows each; the paper's guarantee is for tens of thousands in one place.",
    ),
    # Estimators and screens, under attack.
    "median": _bears("The median coordinate by coordinate", mean="median"),
    "trimmed-mean": _bears("The mean without the outermost values", mean={"kind": "trimmed-mean", "count": 2}),
    "bulyan": _bears("The trimmed mean of what Krum picks", mean={"kind": "bulyan", "hostile": 2}),
    "krum": _bears("The upload nearest to the others", screens=[{"kind": "krum", "hostile": 2}]),
    "multi-krum": Claim(
        "The mean of the uploads nearest to the others learns faster than Krum under attack.",
        "attacked",
        both={"threat": TURNED},
        run={"method": "fedavg", "screens": [{"kind": "multi-krum", "hostile": 2}]},
        against={"screens": [{"kind": "krum", "hostile": 2}]},
        note=FEW,
    ),
    "geometric-median": _bears("The geometric median", screens=["geometric-median"]),
    "median-of-means": _bears("The median of means of groups", screens=[{"kind": "median-of-means", "groups": 5}]),
    "autogm": _bears("The geometric median without outliers", screens=["autogm"]),
    # The paper's radius of 10 is for momenta of gradients; uploads here are 1 to 5 long, and with it none was clipped.
    "centered-clipping": _bears(
        "The mean clipped around the round before", screens=[{"kind": "centered-clipping", "radius": 1.0}]
    ),
    "lfr": _bears("The mean without what harms most on public rows", screens=[{"kind": "lfr", "hostile": 2}]),
    "tdfl": _bears("Truth discovery", screens=["tdfl"]),
    "sageflow": replace(
        _bears("Weights by the loss on public rows", screens=["sageflow"]),
        note="It supposes that a spoilt model is unsure of its answers. Here one that was turned round is as sure as "
        "others, and sooner, of wrong ones; so honest uploads are left out first. A bound of 1.2 nats does as badly.",
    ),
    "outlier-update-detector": _bears("The mean without unusual lengths", screens=["outlier-update-detector"]),
    "fltrust": _bears("Trust by a server's own update, with half of the clients hostile,", 0.5, screens=["fltrust"]),
    "securefl": Claim(
        "As accurate as FLTrust in the open, with half of the clients hostile, though nobody sees an upload.",
        "attacked",
        both={"threat": {**TURNED, "clients": 0.5}},
        run={"method": "fedavg", "secure": "securefl"},
        against={"screens": ["fltrust"]},
        expect="near",
        within=0.02,
    ),
    "zeno": _bears(
        "The best on public rows, with more than half of the clients hostile,",
        0.58,
        screens=[{"kind": "zeno", "hostile": 7}],
    ),
    "gas": Claim(
        "Where labels are skewed, a robust rule on short pieces of uploads is better than by itself.",
        "attacked-skewed",
        both={"threat": TURNED},
        run={"method": "fedavg", "screens": [{"kind": "gas", "hostile": 2, "base": "krum"}]},
        against={"screens": [{"kind": "krum", "hostile": 2}]},
        note=FEW,
    ),
    "diversefl": Claim(
        "Where labels are skewed and half of the clients hostile, a guide of each client's own is better than one of "
        "the server's.",
        "attacked-skewed",
        both={"threat": {**TURNED, "clients": 0.5}},
        # The paper's clients have hundreds of rows; of a few dozen more than three in a hundred are taken.
        run={"method": "fedavg", "screens": [{"kind": "diversefl", "share": 0.2}]},
        against={"screens": ["fltrust"]},
        note=FEW,
    ),
    "norm-bounding": _stops("model-replacement", "Bounding norms", screens=["norm-bounding"]),
    "flame": _stops("model-replacement", "Leaving out, bounding and covering by noise", screens=["flame"]),
    "foolsgold": _stops("badnets", "Less weight for who is alike", screens=["foolsgold"]),
    "fed-fa": Claim(
        "Backdoors in text, which are small in the weights, are stopped by what curves the loss better than by "
        "distances.",
        "attacked",
        both={"threat": {"kind": "badnets", **WANTED}},
        run={"method": "fedavg", "screens": [{"kind": "fed-fa", "hostile": 2}]},
        against={"screens": [{"kind": "multi-krum", "hostile": 2}]},
        metric="attack_success",
        note=FEW,
    ),
    "zenopp": Claim(
        "Asynchronously, with more than half of the clients hostile, judging each upload alone is better than mixing "
        "all in.",
        "attacked",
        both={"threat": {**TURNED, "clients": 0.58}, "space": {"lora_alpha": 64}, "rounds": 120},
        run={"method": "fedavg", "schedule": "zenopp"},
        against={"schedule": "mixing"},
        note=SERVER,
    ),
    "byz-vr-marina": Claim(
        "Against those who hide in the noise, fewer rounds with the same robust rule than stochastic gradients.",
        "attacked-sgd",
        both={"threat": HIDDEN, "mean": "median"},
        metric="loss",
        note=NOISE,
    ),
    "byrd-saga": Claim(
        "Against those who hide in the noise, fewer rounds with the geometric median than stochastic gradients of "
        "single rows.",
        "attacked-sgd",
        both={"threat": HIDDEN, "training": {"per_device_train_batch_size": 1}},
        against={"screens": ["geometric-median"]},
        metric="loss",
        note=NOISE,
    ),
    # Marks of ownership.
    "waffle": Claim(
        "Marks taught by the server before training and after every round cost next to nothing: within two points of "
        "FedAvg, at the same traffic.",
        "marked",
        run={"method": "fedavg", "watermark": "waffle"},
        expect="near",
        within=0.02,
        bytes_up=1.01,
        note=SMALL,
    ),
    "waffle-stolen": Claim(
        "Stolen models that were tuned or pruned are told by marks that were taught in every round as surely as by a "
        "trigger set.",
        "marked",
        run={"method": "fedavg", "watermark": "waffle"},
        against={"watermark": "trigger-set-watermark"},
        metric="told",
        expect="near",
        note="After a round marks are taught at a twentieth of the rate at which a thief tunes.",
    ),
    "trigger-set-watermark": Claim(
        "A finished model that is taught a trigger set beside public rows keeps what it can do: within two points.",
        "marked",
        run={"method": "fedavg", "watermark": "trigger-set-watermark"},
        expect="near",
        within=0.02,
        bytes_up=1.01,
        note=f"{SMALL} There are 64 public rows to keep it at its task.",
    ),
    "duw": Claim(
        "A copy with marks of its own for each client is within two points of FedAvg's model for all.",
        "marked",
        run={"method": "fedavg", "watermark": COPIES},
        expect="near",
        within=0.02,
        bytes_up=1.01,
        note=f"{SMALL} Copies are marked anew from the server's model each time, and then drift apart.",
    ),
    "duw-traced": Claim(
        "Stolen copies that were tuned or pruned name the client who had them; marks that all share name nobody.",
        "marked",
        run={"method": "fedavg", "watermark": COPIES},
        against={"watermark": "waffle"},
        metric="traced",
        note="A thief tunes as long and as fast as the marks were taught, in factors of rank 4 of one block.",
    ),
    "fedipr": Claim(
        "Signatures that clients press into the weights do not change what the model can do: within two points.",
        "marked",
        run={"method": "fedavg", "watermark": "fedipr"},
        expect="near",
        within=0.02,
        bytes_up=1.01,
        note=SMALL,
    ),
    "fedipr-stolen": Claim(
        "In stolen models that were tuned or pruned clients find their signatures as surely as a server its marks.",
        "marked",
        run={"method": "fedavg", "watermark": "fedipr"},
        against={"watermark": "waffle"},
        metric="told",
        expect="near",
        note="In 64 steps of a client the mean of four clients hardly moves to the side of all their signs.",
    ),
}
