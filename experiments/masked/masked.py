"""Distil a masked language model from a sparse cache, in DistilBERT's setting at small scale.

    python experiments/masked/masked.py teacher --text FILE [FILE ...] --work W
    python experiments/masked/masked.py run --work W
    python experiments/masked/masked.py collect --work W

Each FILE is one source of text, such as the plays of one author; the downstream probe is to tell
the source of a passage, so two files are needed at least. If interrupted, the same command resumes.
Several processes may execute `run` on one folder. `collect` writes experiments/results/masked.json;
experiments/compare/pages.py and experiments/healing/tables.py write it into the pages.

    W/documents.jsonl, W/part.jsonl    text of the teacher, and the part that students read
    W/teacher/                         teacher and tokenizer
    W/students/                        `sparselogits compare`: caches, students, metrics
    W/probe/RUN.json                   accuracy of the probe for each student
    W/causal/                          a causal teacher of equal size, and its caches

**Plan, written before the first run.**

- Teacher: a ModernBERT (rotary positions, normalisation before each layer) of 4 layers, width 256,
  WordPiece vocabulary of 8 000 trained on the text, about 5 M parameters. 2 000 steps of 16 windows
  of 128 tokens, of which 30 % are predicted (ModernBERT's rate; 80/10/10 as in BERT), masked anew
  in each pass; AdamW, learning rate 2e-3, 5 % warm-up, cosine decay, bfloat16. It reads none of the
  held-out documents (5 %).
- Student: half of the layers, every second one of the teacher from the first one on, with the
  teacher's embeddings and head, as DistilBERT is initialised. One pass over a part of the text of
  2 100 000 characters (about 0.5 M tokens) in steps of 2 048 tokens, learning rate 1e-3, not tuned
  per method.
- Methods: CE to the original tokens; full KD with the teacher in every step, which is DistilBERT's
  loss with soft targets, at temperature one; Top-12; Top-12 with the ghost token; RS-KD 12 (12
  entries per predicted token, independent rounds); systematic 12. All read the same masked windows,
  those of the caches, in the same order per seed. The student before training is measured too.
- Not part of it: DistilBERT's cosine loss on hidden states, and its sum of the loss to the labels
  and the loss to the teacher; full KD here is the loss to the teacher alone.
- Seeds: 3, which set the order of the windows; all students start from the same weights, and the
  draws of a cache are the same for all seeds.
- Measured on 192 held-out windows, whose masked positions are the same for all: loss, KL(teacher ||
  student), expected calibration error (15 bins of equal width), top-1 agreement.
- Probe: the source of a passage of 24 tokens, none masked. The student's last states are averaged
  over the passage, standardised, and a linear classifier is trained on them (2 400 passages of
  training documents, as many per source; 1 200 of held-out documents). Accuracy in per cent.
- Bytes of the targets per token of text, of the three samplers' caches, and of caches with the same
  samplers of a causal teacher of equal layers and width, which is trained for a fifth of the steps.
- **Endpoint**: the share of the way from CE's KL to full KD's that RS-KD 12 covers, as a ratio of
  means over seeds, with Fieller's 95 % interval.
- **Confirmed: a sparse cache replaces the online teacher**, if the lower limit is at least 90 %.
- **Refuted**, if the upper limit is below 90 %.
- **Undecided** otherwise, or if full KD's KL is not lower than CE's by a paired t test.
- Secondary, paired t tests over seeds with Holm's correction, on KL: RS-KD 12, systematic 12 and
  Top-12 with the ghost token minus full KD; RS-KD 12 minus systematic 12; Top-12 minus CE. Loss,
  calibration and the probe are reported without a test.
- Changed before any result was looked at: float32 in place of bfloat16 on a processor that has no
  bfloat16 products (they are emulated there, nine times slower than float32). The result names the
  format. A run in bfloat16 was lost with its machine before it was complete.
- The result is reported whatever it is. No seed is added or left out after looking.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from experiments.planned import PRECISION, holm, less  # noqa: E402
from experiments.small_teacher import documents  # noqa: E402

from sparselogits.caching import CacheRequest, build_caches  # noqa: E402
from sparselogits.corpus import (  # noqa: E402
    PackedCorpus,
    open_source,
    pack,
    packing_for,
    tokenizer_fingerprint,
)
from sparselogits.corpus.pieces import document_key  # noqa: E402
from sparselogits.corruption import Corruption  # noqa: E402
from sparselogits.evaluate import t_interval  # noqa: E402
from sparselogits.evaluate.intervals import fieller_interval, two_sided_p  # noqa: E402
from sparselogits.files import write_whole  # noqa: E402
from sparselogits.lab.compare import (  # noqa: E402
    Results,
    compare,
    parse_compare_recipe,
    read_results,
)
from sparselogits.locks import Held, lock_file  # noqa: E402
from sparselogits.samplers import Multinomial, Systematic, TopK  # noqa: E402
from sparselogits.store import Cache  # noqa: E402
from sparselogits.teacher import load_teacher  # noqa: E402
from sparselogits.teacher.loading import load_language_model, load_tokenizer  # noqa: E402

RESULT = ROOT / "experiments" / "results" / "masked.json"
HOLDOUT = 0.05
AIM = 0.9
SPECIAL = {name: f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}


@dataclass(frozen=True)
class Size:
    """Sizes of the experiment; the defaults are those of the plan."""

    vocabulary: int = 8000
    layers: int = 4
    width: int = 256
    heads: int = 4
    window: int = 128
    rate: float = 0.3
    batch: int = 16
    teacher_steps: int = 2000
    teacher_learning_rate: float = 2e-3
    characters: int = 2_100_000
    learning_rate: float = 1e-3
    seeds: int = 3
    heldout: int = 192
    passage: int = 24
    passages: int = 2400
    causal_windows: int = 256


PLAN = Size()
NAMES = {
    "before training": {"method": "none"},
    "CE": {"method": "ce"},
    "full KD": {"method": "full"},
    "Top-12": {"sampler": "topk", "k": 12},
    "Top-12 ghost": {"sampler": "topk", "k": 12, "missing_mass": "ghost"},
    "RS-KD 12": {"sampler": "multinomial", "budget": 12},
    "systematic 12": {"sampler": "systematic", "budget": 12},
}
"""Methods as in a recipe of `sparselogits compare`, by name."""

SECONDARY = (
    ("RS-KD 12", "full KD"),
    ("systematic 12", "full KD"),
    ("Top-12 ghost", "full KD"),
    ("RS-KD 12", "systematic 12"),
    ("Top-12", "CE"),
)


# -- text and teachers -----------------------------------------------------------------------------


def write_text(files: Sequence[Path], work: Path, size: Size) -> None:
    """Write all documents with their sources, and the part that students read, in random order."""
    found = [(text, file.stem) for file in files for text in documents([file])]
    random.Random(0).shuffle(found)
    lines, part, characters = [], [], 0
    for text, source in found:
        lines.append(json.dumps({"text": text, "source": source}) + "\n")
        if not is_held_out(text):
            if characters >= size.characters:
                continue
            characters += len(text)
        part.append(lines[-1])
    write_whole(work / "part.jsonl", "".join(part))
    write_whole(work / "documents.jsonl", "".join(lines))  # last, as its presence marks completion


def is_held_out(text: str) -> bool:
    """Return whether the packing holds out a document, which depends on its content alone."""
    return document_key(text.encode()) < int(HOLDOUT * 2**64)


def word_pieces(texts: Sequence[str], size: Size) -> PreTrainedTokenizerFast:
    """Train a WordPiece tokenizer in the manner of uncased BERT's."""
    backend = Tokenizer(models.WordPiece(unk_token=SPECIAL["unk"]))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size.vocabulary, special_tokens=list(SPECIAL.values()), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    ends = [(SPECIAL[name], backend.token_to_id(SPECIAL[name])) for name in ("cls", "sep")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    names = {f"{name}_token": text for name, text in SPECIAL.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


class MaskedAnew(Dataset):  # type: ignore[type-arg]
    """Training windows, each pass over them with other masked tokens.

    Args:
        corpus: packed text.
        corruption: corruption of the windows.
        count: number of windows in all passes together.
    """

    def __init__(self, corpus: PackedCorpus, corruption: Corruption, count: int) -> None:
        self.corpus, self.corruption, self.count = corpus, corruption, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.corpus.read(at := index % self.corpus.windows, at + 1)[0]
        corrupted = self.corruption(window.tokens, index)
        labels = self.corruption.objective.labels(window.tokens, corrupted.chosen)
        ids = torch.from_numpy(corrupted.inputs).long()
        return {"input_ids": ids, "labels": torch.from_numpy(labels)}


class NextTokens(MaskedAnew):
    """Training windows of a causal model."""

    def __init__(self, corpus: PackedCorpus, count: int) -> None:
        self.corpus, self.count = corpus, count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.corpus.read(at := index % self.corpus.windows, at + 1)[0]
        ids = torch.from_numpy(window.tokens).long()
        return {"input_ids": ids, "labels": ids}


def fit(
    model: nn.Module, text: Dataset[Any], folder: Path, size: Size, steps: int
) -> list[dict[str, Any]]:
    """Train a teacher, from its last checkpoint if there is one; return the log of its losses."""
    checkpoints = folder.with_name(folder.name + "-checkpoints")
    trainer = Trainer(
        model,
        TrainingArguments(
            str(checkpoints),
            max_steps=steps,
            per_device_train_batch_size=size.batch,
            learning_rate=size.teacher_learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            weight_decay=0.01,
            bf16=PRECISION == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            seed=0,
            logging_steps=max(1, steps // 40),
            save_steps=100,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=text,
    )
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    return [line for line in trainer.state.log_history if "loss" in line]


def packed(name: str, work: Path, tokenizer: Any, size: Size) -> PackedCorpus:
    """Pack W/NAME.jsonl."""
    packing = packing_for(tokenizer, window_length=size.window, holdout=HOLDOUT)
    source = open_source(str(work / f"{name}.jsonl"))
    return pack(source, tokenizer, packing, work / f"packed-{name}", vocab_size=size.vocabulary)


def make_teacher(files: Sequence[Path], work: Path, size: Size) -> None:
    """Train tokenizer and teacher, unless W/teacher is complete."""
    if (work / "teacher" / "training.json").exists():
        return
    if len({file.stem for file in files}) < 2:
        raise SystemExit(
            f"--text names {len(files)} source(s) of text; the probe tells the source of a "
            "passage, which needs two files with different names at least"
        )
    if not (work / "documents.jsonl").exists():
        write_text(files, work, size)
    begun = work / "teacher-begun"
    if not (begun / "tokenizer.json").exists():
        lines = (work / "documents.jsonl").open(encoding="utf-8")
        texts = [json.loads(line)["text"] for line in lines]
        word_pieces(texts, size).save_pretrained(begun)
    tokenizer = load_tokenizer(str(begun))
    corpus = packed("documents", work, tokenizer, size)
    corruption = Corruption.of_tokenizer(tokenizer, size.vocabulary, rate=size.rate, seed=1)
    set_seed(0)
    model = ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=size.width * 8 // 3 // 8 * 8,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            max_position_embeddings=size.window,
            local_attention=size.window,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.cls_token_id,
            cls_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
            sep_token_id=tokenizer.sep_token_id,
            sparse_prediction=True,  # the head runs at the masked positions alone
        )
    )
    count = size.teacher_steps * size.batch
    text = MaskedAnew(corpus, corruption, count)
    losses = fit(model, text, begun, size, size.teacher_steps)
    model.config.sparse_prediction = False
    model.save_pretrained(begun)
    facts = {
        "size": asdict(size),
        "parameters": sum(p.numel() for p in model.parameters()),
        "sources": sorted({file.stem for file in files}),
        "training_windows": corpus.windows,
        "curve": losses,
        "precision": PRECISION,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    write_whole(begun / "training.json", json.dumps(facts, indent=1) + "\n")
    begun.rename(work / "teacher")
    shutil.rmtree(work / "teacher-begun-checkpoints")


def causal_bytes(work: Path, size: Size) -> dict[str, float]:
    """Return the bytes per token of caches of a causal teacher, by sampler; train it if needed."""
    out = work / "causal" / "bytes.json"
    if out.exists():
        stored: dict[str, float] = json.loads(out.read_text())
        return stored
    folder, tokenizer = work / "causal" / "teacher", load_tokenizer(str(work / "teacher"))
    if not (folder / "config.json").exists():
        set_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size.vocabulary,
                hidden_size=size.width,
                intermediate_size=size.width * 8 // 3 // 8 * 8,
                num_hidden_layers=size.layers,
                num_attention_heads=size.heads,
                max_position_embeddings=size.window,
                tie_word_embeddings=True,
            )
        )
        steps = max(1, size.teacher_steps // 5)
        text = NextTokens(packed("documents", work, tokenizer, size), steps * size.batch)
        fit(model, text, folder, size, steps)
        begun = folder.with_name("teacher-begun")
        tokenizer.save_pretrained(begun)
        model.save_pretrained(begun)
        begun.rename(folder)
        shutil.rmtree(work / "causal" / "teacher-checkpoints")
    text_file = work / "causal-part.jsonl"
    with (work / "part.jsonl").open(encoding="utf-8") as lines:
        texts = [line for line in lines if not is_held_out(json.loads(line)["text"])]
    kept, tokens = [], 0
    while texts and tokens < size.causal_windows * size.window:
        kept.append(texts.pop())
        tokens += len(tokenizer(json.loads(kept[-1])["text"])["input_ids"])
    write_whole(text_file, "".join(kept))
    corpus = packed("causal-part", work, tokenizer, size)
    teacher = load_teacher(str(folder), tokenizer=tokenizer, dtype=PRECISION)
    samplers = {
        "Top-12": (TopK(12), None),
        "RS-KD 12": (Multinomial(), 12.0),
        "systematic 12": (Systematic(), 12.0),
    }
    roots = {name: work / "causal" / name.lower().replace(" ", "-") for name in samplers}
    build_caches(
        teacher,
        corpus,
        [CacheRequest(roots[name], own, budget) for name, (own, budget) in samplers.items()],
        tokenizer_hash=tokenizer_fingerprint(tokenizer),
    )
    found = {}
    for name, root in roots.items():
        of = Cache.open(root).statistics()
        found[name] = (of.bytes_on_disk - of.text_bytes) / of.tokens
    write_whole(out, json.dumps(found, indent=1) + "\n")
    return found


# -- students --------------------------------------------------------------------------------------


def recipe_of(work: Path, size: Size) -> dict[str, Any]:
    """Return the recipe of the comparison, as values of a YAML file."""
    return {
        "title": "masked language models",
        "teacher": str(work / "teacher"),
        "teacher_dtype": PRECISION,
        "data": str(work / "part.jsonl"),
        "out": str(work / "students"),
        "window": size.window,
        "holdout": HOLDOUT,
        "heldout_windows": size.heldout,
        "mask_rate": size.rate,
        "students": {
            "every second layer": {
                "from": "teacher",
                "drop_layers": list(range(1, size.layers, 2)),
            }
        },
        "training": {
            "per_device_train_batch_size": size.batch,
            "learning_rate": size.learning_rate,
            "bf16": PRECISION == "bfloat16",
            "save_steps": 50,
        },
        "seeds": list(range(size.seeds)),
        "methods": [{"name": name, **method} for name, method in NAMES.items()],
    }


def run(work: Path, size: Size) -> None:
    """Train and measure all students that are not done, and probe them and their teacher."""
    if not (work / "teacher" / "training.json").exists():
        raise SystemExit(f"there is no teacher in {work}; start the command `teacher` first")
    results = compare(parse_compare_recipe(recipe_of(work, size), source="the experiment"))
    passages = None
    for name, path in probed(results, work).items():
        out = work / "probe" / f"{name}.json"
        if out.exists():
            continue
        passages = passages or Passages.of(work, size)
        model = load_language_model(str(path), dtype="float32").eval()
        write_whole(out, json.dumps({"accuracy": passages.accuracy(model)}) + "\n")
    with lock_file(work / "causal.lock") as lock:
        if lock.held is Held.ALONE:  # otherwise another process does it
            causal_bytes(work, size)


def probed(results: Results, work: Path) -> dict[str, Path]:
    """Return the folders of the models that are probed, by a name for their results."""
    done = [run for run in results.runs if run.status == "done" and run.folder is not None]
    folders = {Path(str(run.folder)).name: work / "students" / str(run.folder) for run in done}
    return {"teacher": work / "teacher"} | {n: own / "model" for n, own in folders.items()}


@dataclass(frozen=True)
class Passages:
    """Passages whose source is to be told.

    Args:
        tokens: token ids of the passages, int64 [N, L].
        sources: index of each passage's source, int64 [N].
        training: number of passages to train on; they come first.
    """

    tokens: Tensor
    sources: Tensor
    training: int

    @classmethod
    def of(cls, work: Path, size: Size) -> Passages:
        """Cut passages from the documents, as many of each source."""
        tokenizer = load_tokenizer(str(work / "teacher"))
        found: dict[tuple[bool, str], list[list[int]]] = {}
        with (work / "documents.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                document = json.loads(line)
                ids = tokenizer(document["text"], add_special_tokens=False)["input_ids"]
                own = found.setdefault((is_held_out(document["text"]), document["source"]), [])
                own += [
                    ids[at : at + size.passage]
                    for at in range(0, len(ids) - size.passage + 1, size.passage)
                ]
        sources = sorted({source for _, source in found})
        order, tokens, labels, counts = random.Random(0), [], [], []
        for held_out, wanted in ((False, size.passages), (True, size.passages // 2)):
            # as many of each source, so that guessing is right once in as many passages
            few = min(len(found.get((held_out, source), ())) for source in sources)
            few = min(few, wanted // len(sources))
            if few == 0:
                raise SystemExit(
                    f"a source has no passage of {size.passage} tokens; give longer text"
                )
            for index, source in enumerate(sources):
                tokens += order.sample(found[held_out, source], few)
                labels += [index] * few
            counts.append(len(labels))
        return cls(torch.tensor(tokens), torch.tensor(labels), counts[0])

    @torch.no_grad()
    def states(self, model: nn.Module) -> Tensor:
        """Return the model's last states, averaged over each passage, [N, D]."""
        base: Any = model.base_model
        parts = [base(input_ids=part).last_hidden_state.mean(1) for part in self.tokens.split(64)]
        return torch.cat(parts).double()

    def accuracy(self, model: nn.Module) -> float:
        """Train a linear classifier on the model's states; return its accuracy on other text."""
        states, classes = self.states(model), int(self.sources.max()) + 1
        train = states[: self.training]
        states = (states - train.mean(0)) / train.std(0).clamp_min(1e-6)
        weight = torch.zeros(states.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)
        inputs = torch.cat([states, torch.ones(len(states), 1, dtype=torch.float64)], 1)
        optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = inputs[: self.training] @ weight
            value = nn.functional.cross_entropy(logits, self.sources[: self.training])
            value = value + 1e-3 * weight[:-1].square().sum()
            value.backward()
            return value

        optimizer.step(loss)  # type: ignore[arg-type]
        guessed = (inputs[self.training :] @ weight).argmax(1)
        return float((guessed == self.sources[self.training :]).double().mean())


# -- result ----------------------------------------------------------------------------------------


def judge(kl: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Apply the plan's rule to the KL of every method, one value per seed."""
    gap = t_interval(less(kl, "CE", "full KD"))
    share = fieller_interval(less(kl, "CE", "RS-KD 12"), less(kl, "CE", "full KD"))
    if gap.low is None:
        verdict, reason = "none", "An interval needs at least two seeds."
    elif gap.low <= 0 or share.low is None or share.high is None:
        verdict, reason = "undecided", "Full KD's KL is not distinguishable from CE's."
    elif share.low >= AIM:
        verdict, reason = "confirmed", "RS-KD 12 covers at least 90 % of the way to full KD's KL."
    elif share.high < AIM:
        verdict, reason = "refuted", "RS-KD 12 covers less than 90 % of the way to full KD's KL."
    else:
        verdict, reason = "undecided", "The interval of the share contains 90 %."
    differences = {f"{one} - {other}": less(kl, one, other) for one, other in SECONDARY}
    tests: list[dict[str, Any]] = []
    if gap.low is not None:
        p = [two_sided_p(own) for own in differences.values()]
        tests = [
            {"difference": name, **t_interval(own).to_json(), "p": one, "p_holm": corrected}
            for (name, own), one, corrected in zip(differences.items(), p, holm(p), strict=True)
        ]
    return {
        "verdict": verdict,
        "reason": reason,
        "endpoint": share.to_json(),
        "gap": gap.to_json(),
        "secondary": tests,
    }


def collect(work: Path, out: Path, size: Size) -> dict[str, Any]:
    """Combine the metrics of all students, and write the result with the verdict."""
    results = read_results(work / "students")
    training = json.loads((work / "teacher" / "training.json").read_text())
    runs = {(run.method, run.seed): run for run in results.runs if run.status == "done"}
    methods: dict[str, Any] = {}
    for row in results.methods:
        own = [run for (name, _), run in runs.items() if name == row.method]
        probes = [work / "probe" / f"{Path(str(run.folder)).name}.json" for run in own]
        methods[row.method] = {
            "seeds": row.seeds_done,
            "entries": row.entries,
            "bytes_per_token": row.bytes_per_token,
            "tokens_per_cpu_second": row.tokens_per_cpu_second,
            "training_tokens": max((run.tokens or 0 for run in own), default=0),
            **{name: [run.figures[name] for run in own] for name in METRICS},
            "probe": [json.loads(file.read_text())["accuracy"] for file in probes if file.exists()],
        }
    assert results.teacher is not None
    seeds = list(range(size.seeds))
    trained = [name for name in NAMES if name != "before training"]
    complete = all((name, seed) in runs for name in trained for seed in seeds)
    probe, causal = work / "probe" / "teacher.json", work / "causal" / "bytes.json"
    result: dict[str, Any] = {
        "size": asdict(size),
        "as_planned": size == PLAN and training["size"] == asdict(PLAN),
        "seeds": size.seeds if complete else min(len(methods[name]["seeds"]) for name in trained),
        "teacher": {
            "parameters": training["parameters"],
            "training_loss": training["curve"][-1]["loss"],
            **{name: results.teacher.figures[name] for name in ("loss", "ece")},
            "probe": json.loads(probe.read_text())["accuracy"] if probe.exists() else None,
        },
        "sources": training["sources"],
        "corpus": results.settings["corpus"],
        "student_parameters": results.settings["student_parameters"]["every second layer"],
        "methods": methods,
        "causal_bytes_per_token": json.loads(causal.read_text()) if causal.exists() else None,
        "precision": training["precision"],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if complete:
        result |= judge({name: methods[name]["kl"] for name in trained})
    else:
        reason = "Not all students are trained; the rule is applied to all of them."
        result |= {"verdict": "none yet", "reason": reason, "endpoint": None, "secondary": []}
    write_whole(out, json.dumps(result, indent=1) + "\n")
    return result


METRICS = ("loss", "kl", "ece", "agreement")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("teacher", "run", "collect"))
    parser.add_argument("--text", type=Path, nargs="+", help="one file per source (teacher)")
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--out", type=Path, default=RESULT, help="file of the result (collect)")
    parser.add_argument("--threads", type=int, default=1)
    for name, value in asdict(PLAN).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), default=value, help=f"plan: {value}")
    arguments = parser.parse_args()
    size = Size(**{name: getattr(arguments, name) for name in asdict(PLAN)})
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.command == "teacher":
        if not arguments.text:
            parser.error("teacher needs --text with one file per source")
        make_teacher(arguments.text, arguments.work, size)
    elif arguments.command == "run":
        run(arguments.work, size)
    else:
        if size != PLAN and arguments.out == RESULT:
            parser.error("a run of other sizes does not replace the planned result; give --out")
        found = collect(arguments.work, arguments.out, size)
        print(f"{found['verdict']}: {found['reason']}")


if __name__ == "__main__":
    main()
