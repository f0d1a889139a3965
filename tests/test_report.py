"""The report and the model card: what they say, that they are whole, and that nothing in the data can break them."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from sparsec.calibrate.corpus import Corpus, Document
from sparsec.calibrate.splits import Calibration
from sparsec.compiler.gate import verdict
from sparsec.compiler.recipe import Gate, Recipe
from sparsec.export.card import model_card
from sparsec.export.cautions import cautions, noise
from sparsec.export.report import render_report
from sparsec.export.words import change, commands, percent, plural, size
from sparsec.passes.distill import Distill
from sparsec.passes.indexcache import IndexCache
from sparsec.passes.rtpurbo import Rtpurbo
from sparsec.plan import Plan

HOSTILE = '<script>alert("x")</script>`|\n# ]]>'
VOID = {"meta", "link", "br", "img", "input", "hr", "source"}


class Inputs(NamedTuple):
    """What the pipeline gives to both."""

    plan: Plan
    measurements: dict[str, Any]
    manifest: dict[str, Any]

    def passing(self, name: str) -> dict[str, Any]:
        """What a pass measured."""
        found: dict[str, Any] = next(p["measured"] for p in self.measurements["passes"] if p["name"] == name)
        return found


@pytest.fixture(scope="module")
def text(tiny_llama: Path) -> dict[str, Any]:
    """What a calibration says of itself; two of its documents are copies with hostile names."""
    words = (
        "brown",
        "fox",
        "jumps",
        "over",
        "lazy",
        "dogs",
        "while",
        "seven",
        "grey",
        "geese",
        "watch",
        "the",
        "river",
    )
    bodies = [" ".join(f"{word}{n}{i}" for i in range(40) for word in words) for n in range(6)]
    names = [*(f"{n}.txt" for n in range(6)), HOSTILE]
    documents = tuple(Document(name, body) for name, body in zip(names, [*bodies, bodies[0]], strict=True))
    return Calibration(Corpus("corpus", documents, "7 files"), AutoTokenizer.from_pretrained(tiny_llama)).describe()


@pytest.fixture
def made(text: dict[str, Any]) -> Callable[..., Inputs]:
    """``made(share=True, split=True, train=False)``: a small model of 6 layers, 4 query heads and 2 KV heads."""

    def make(share: bool = True, split: bool = True, train: bool = False) -> Inputs:
        rtpurbo, indexcache = Rtpurbo(steps=4), IndexCache(max_loss=0.02)
        passes = []
        if split:
            passes.append(_record(rtpurbo, _split_measured()))
        if share:
            passes.append(_record(indexcache, _search_measured()))
        if train:
            passes.append(_record(Distill(), _training_measured()))
        dense = _loss(0.8, [0.78, 0.82], kv_bytes=12 << 20)
        found = _loss(0.808, [0.79, 0.826], kv_bytes=7 << 20)
        recall = {"recall_mean": 0.934, "recall_p5": 0.71, "kept_mean": 222.4, "kept_p95": 512.0}
        selector = {"heads": 6, "rows": 1024, "context_mean": 1792.5, **recall} if split else {}
        for each in passes[:-1]:
            each["after"] = _loss(0.82, [0.81, 0.83], kv_bytes=7 << 20) | {"selector": selector}
        near = _loss(0.9, [0.88, 0.92], kv_bytes=6 << 20) | {"rows": [[1.0, 5.0], [2.0, 1.0]]}
        gate = verdict(Gate(), dense, found | {"selector": selector}, near)
        gate |= {"context": 2048, "decode_rows": 512, "windows": 2, "questions": 0}
        measurements = {
            "producer": "sparsec 0",
            "seed": 7,
            "passes": passes,
            "gate": gate,
            "calibration": copy.deepcopy(text),
        }
        recipe = Recipe(passes={p["name"]: p["config"] for p in passes} or {"other": {}}, calibration="corpus", seed=7)
        source = {"spec": "models/base", "kind": "local", "revision": None, "digest": "ab" * 32}
        manifest = {
            "producer": "sparsec 0",
            "source": source | {"license": "apache-2.0", "base_model": "someone/base"},
            "recipe": recipe.model_dump(mode="json"),
            "calibration": text["digest"],
            "device": "cpu",
            "dtype": "auto",
            "weights": "trained" if train else "unchanged",
            "versions": {"sparsec": "0", "torch": "2"},
        }
        return Inputs(_plan(share, split), measurements, manifest)

    return make


def _record(each: Any, measured: dict[str, Any]) -> dict[str, Any]:
    return {"name": each.name, "tier": each.tier, "config": each.model_dump(mode="json"), "measured": measured}


def _loss(mean: float, windows: list[float], kv_bytes: int) -> dict[str, Any]:
    found = {"bits_per_byte": mean, "windows": windows, "tokens": 1022, "bytes": 4000, "kv_bytes": kv_bytes}
    return found | {"rows": [[1.0, 2.0], [2.0, 1.0]], "selector": {}}


def _plan(share: bool, split: bool) -> Plan:
    kept = {1: (1, 0, 0, 0), 3: (1, 1, 0, 1), 4: (0, 0, 0, 1), 5: (0, 1, 0, 0)} if split else {}
    index = {1: "full", 3: "shared", 4: "full", 5: "shared"} if share else dict.fromkeys(kept, "full")
    heads = [kept.get(i, (0, 0, 0, 0) if split else (1, 1, 1, 1)) for i in range(6)]
    data: dict[str, Any] = {
        "producer": "sparsec 0",
        "model": {"model_type": "llama", "layers": 6, "heads": 4, "kv_heads": 2, "head_dim": 8},
        "layers": [{"heads": h, "index": index.get(i, "none") if split else "none"} for i, h in enumerate(heads)],
    }
    if split:
        selector = {"rope": "pre", "rank": 16, "top_p": 0.9, "granularity": "token", "block": 64}
        scope = "layer" if share else "head"
        data["selector"] = selector | {"sinks": 4, "recent": 64, "scope": scope}
        data |= {"window": {"size": 512, "sinks": 4}, "min_context": 516}
    return Plan.parse(data)


def _split_measured() -> dict[str, Any]:
    heads = [(1, 0), (3, 0), (3, 1), (3, 3), (4, 3), (5, 1)]
    table = [
        {"layer": layer, "head": head, "recall_mean": 0.9 + 0.01 * n, "recall_p5": 0.7, "kept_mean": 90.0 + 60 * n}
        | {"kept_p95": 400.0 + n}
        | {"sinkless_mean": 0.8 + 0.01 * n, "sinkless_p5": 0.6, "far_mean": 0.7, "far_p5": None if n == 5 else 0.4}
        | {
            "other_kept_mean": 700.0 + n,
            "other_recall_mean": 0.97,
            "oracle_kept_mean": 55.0,
            "oracle_recall_mean": 0.96,
        }
        for n, (layer, head) in enumerate(heads)
    ]
    summary = {"heads": 6, "rows": 510, "context_mean": 1920.5, "recall_mean": 0.925, "recall_p5": 0.7}
    summary |= {"kept_mean": 240.0, "kept_p95": 405.0, "sampled_rows": 256, "granularity": "token", "block": 64}
    summary |= {"sinkless_mean": 0.81, "sinkless_p5": 0.59, "far_mean": 0.71, "far_p5": 0.41, "far_mass_mean": 0.33}
    summary |= {"other_kept_mean": 701.0, "other_kept_p95": 990.0, "other_recall_mean": 0.975, "forced": 68}
    summary |= {"oracle_kept_mean": 56.0, "oracle_kept_p95": 88.0, "oracle_recall_mean": 0.965, "read": None}
    reads = [
        {"context": context, "index": 1024.0 * context, "kept": 2.0**20, "dense": 2048.0 * context}
        for context in (640.0, 1920.5)
    ]
    resident = {"full": 5 << 20, "local": 1 << 20, "index": 1 << 19, "sums": 0, "dense": 12 << 20}
    return {
        "head_scores": [[0.9 - 0.1 * head if (i, head) in heads else 0.01 for head in range(4)] for i in range(6)],
        "rank_stability": {"spearman": 0.87, "jaccard": 0.75},
        "needles": 32,
        "kept_heads": 6,
        "possible_heads": 24,
        "window": 512,
        "context": 2048,
        "reach": 2048,
        "readable": 2048,
        "causal_check": {"heads": 6, "dense": 0.95, "tokens": 276, "kept_heads_local": 0.01, "random_heads_local": 0.7},
        "stage1": {"kl_closed_form": 2.4, "kl_trained": 0.6, "losses": [2.0, 1.5, 0.9, 0.7], "windows": 8, "rows": 512},
        "selector": {
            "summary": summary,
            "contexts": [{"context": length, **summary} for length in (512, 1024, 2048)],
            "context": 2048,
            "heads": table,
            "reads": reads,
            "break_even": {"tokens": 1024.4, "bound": "about"},
            "resident": resident,
        },
    }


def _search_measured() -> dict[str, Any]:
    return {
        "pattern": "FSFS",
        "layers": [1, 3, 4, 5],
        "loss_before": 2.0,
        "loss_after": 2.01,
        "flips": [
            {"layer": 3, "loss": 2.004, "trials": {"3": 2.004, "4": 2.02, "5": 2.008}}
            | {"second": 5, "margin": 0.004, "error": 0.003},
            {"layer": 5, "loss": 2.01, "trials": {"4": 2.03, "5": 2.01}},
        ],
        "stopped": "target",
        "candidates": 5,
        "layer_evaluations": 40,
        "layer_evaluations_plain": 100,
        "layer_tokens": 9000,
        "layer_tokens_plain": 400000,
        "order": "exact",
        "others": {
            name: {"pattern": "FSFS", "loss": 2.02, "above": 0.01, "error": error}
            for name, error in (("one-shot", 0.002), ("uniform", 0.02), ("overlap", 0.004))
        },
        "overlap": [[1.0 if i == j else 0.4 for j in range(4)] for i in range(4)],
        "windows": 3,
        "context": 2048,
        "rows": 256,
        "trained": {
            "kl_before": 1.4, "kl_trained": 0.5, "losses": [1.3, 0.8, 0.5], "windows": 4, "rows": 512,
            "serves": {"1": [3], "4": [5]},
        },
    }  # fmt: skip


def _training_measured() -> dict[str, Any]:
    checks = [{"step": step, "kl": kl} for step, kl in ((0, 0.12), (2, 0.06), (4, 0.07))]
    return {
        "weights": "lora", "tier": "minutes", "context": 2048, "rows": 512, "windows": 16, "with_questions": 8,
        "tokens": 32768, "teacher_mass": 0.87, "checks": checks, "kl_before": 0.12, "kl_best": 0.06, "best_step": 2,
        "diverged": False, "losses": [0.11, 0.08, 0.06, 0.05], "changed_tensors": 42,
    }  # fmt: skip


class _Reader(HTMLParser):
    """Checks nesting as it reads, and collects text, attributes and section names."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.sections: list[str | None] = []
        self.words = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "section":
            self.sections.append(dict(attrs)["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.words += data


def read(inputs: Inputs) -> _Reader:
    return _Reader(render_report(*inputs))


def front_matter(card: str) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return data


def drawings(inputs: Inputs) -> dict[str, ElementTree.Element]:
    """The page's outermost SVGs, parsed as XML, by class and number."""
    found = re.findall(r"<figure>(<svg.*?</svg>)<figcaption>", render_report(*inputs), flags=re.S)
    trees = [ElementTree.fromstring(each) for each in found]
    return {f"{tree.get('class')}{n}": tree for n, tree in enumerate(trees)}


def _source(drawing: ElementTree.Element) -> str:
    drawing.attrib.pop("aria-label")
    return ElementTree.tostring(drawing, encoding="unicode")


def test_page_has_every_section_in_order(made: Callable[..., Inputs]) -> None:
    sections = ["heads", "detection", "stage1", "selectors", "sharing", "speed", "passes", "text", "recipe", "warnings"]
    assert read(made()).sections == sections
    assert read(made(train=True)).sections == [*sections[:5], "training", *sections[5:]]


def test_heads_that_training_chose(made: Callable[..., Inputs]) -> None:
    inputs = made()
    split = next(each for each in inputs.measurements["passes"] if each["name"] == "rtpurbo")["measured"]
    assert "gates" not in render_report(*inputs)
    split["gates"] = {"steps": 120, "context": 8192, "open": 6, "agree_with_needles": 4}
    text = render_report(*inputs)
    assert "120 steps trained gates" in text
    assert "240 windows of 8,192 tokens" in text
    assert "needles would keep 4" in text


def test_sections_of_passes_that_did_not_run_are_absent(made: Callable[..., Inputs]) -> None:
    assert read(made(share=False)).sections == [
        "heads",
        "detection",
        "stage1",
        "selectors",
        "speed",
        "text",
        "recipe",
        "warnings",
    ]
    assert read(made(share=False, split=False)).sections == ["text", "recipe", "warnings"]


def test_page_loads_nothing(made: Callable[..., Inputs]) -> None:
    page = render_report(*made())
    reader = _Reader(page)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(reader.tags)
    targets = [value for name, value in reader.attributes if name in ("src", "href", "xlink:href", "action", "data")]
    assert targets == ["#warnings"]
    assert "http" not in page
    assert not re.search(r"url\(|@import|@font-face", page)


def test_drawings_are_xml_with_a_label_and_finite_places(made: Callable[..., Inputs]) -> None:
    found = drawings(made())
    assert [name.rstrip("0123456789") for name in found] == [
        "headmap",
        "bars",
        "curve",
        "scatter",
        "sharing",
        "curve",
        "curve",
        "heat",
        "curve",
        "curve",
    ]
    for tree in found.values():
        title = tree.find("title")
        assert title is not None
        assert title.text == tree.get("aria-label")
        for element in tree.iter():
            for name in ("x", "y", "width", "height", "cx", "cy", "x1", "x2", "y1", "y2"):
                place = element.get(name, "0").rstrip("%")
                assert -20 <= float(place) <= 1000, ElementTree.tostring(element)


def test_headline_shows_every_key_number(made: Callable[..., Inputs]) -> None:
    words = read(made()).words.partition("What runs")[0]
    for number in (
        "6 of 24",
        "25.0% of query heads",
        "4 of 6",
        "2 with an indexer, 2 shared",
        "0.8080",
        "+1.00% against dense 0.8000",
        "93.4%",
        "222 of 1,792",
        "12.4% of the context",
        "7.00 MiB",
        "−41.7% against dense 12.0 MiB",
        "Gate passed",
        "2 held-out windows of 2,048 tokens",
    ):
        assert number in words, number


def test_failed_gate_says_so_with_its_reasons(made: Callable[..., Inputs]) -> None:
    inputs = made()
    inputs.measurements["gate"].update(passed=False, failures=["bits per byte rose by 9.00%, 5.00% is allowed"])
    words = read(inputs).words
    assert "Gate failedBits per byte rose by 9.00%, 5.00% is allowed." in words
    assert "Gate passed" not in words
    assert "Do not deploy this artifact." in words
    assert "failed its gate" in model_card(*inputs)


def test_head_map_draws_and_lists_the_plan(made: Callable[..., Inputs]) -> None:
    inputs = made()
    picture = drawings(inputs)["headmap0"]
    kinds = [element.get("class") for element in picture.iter("rect")]
    assert kinds.count("kept") == 6
    assert kinds.count("local") == 18
    assert kinds.count("plate") == 12 - 7  # KV heads with a retrieval head among their query heads
    assert (kinds.count("full"), kinds.count("shared")) == (2, 2)
    row = '<td>3</td><td>0, 1, 3</td><td>shared with 1</td><td class="num">0.900</td>'
    assert row in render_report(*inputs)
    shades = [float(e.get("fill-opacity", "")) for e in picture.iter("rect") if e.get("class") == "kept"]
    assert max(shades) == 1.0
    assert min(shades) < max(shades)


def test_layers_left_to_the_model_are_shown_as_such(made: Callable[..., Inputs]) -> None:
    inputs = made()
    layers = [layer.model_dump() for layer in inputs.plan.layers]
    layers[0]["heads"] = layers[2]["heads"] = None
    inputs = inputs._replace(plan=inputs.plan.edit(layers=layers))
    assert [e.get("class") for e in drawings(inputs)["headmap0"].iter("rect")].count("native") == 2
    words = read(inputs).words
    assert "layers 0, 2, which the model itself runs" in words
    assert "6 of 16" in words


def test_causal_check_is_judged(made: Callable[..., Inputs]) -> None:
    inputs = made()
    assert "So it is the kept heads that carry the copying." in read(inputs).words
    inputs.passing("rtpurbo")["causal_check"]["kept_heads_local"] = 0.6
    words = read(inputs).words
    assert "So it is the kept heads" not in words
    assert "do not rely on the split" in words
    assert any("causal check does not show" in text for text in cautions(inputs.plan, inputs.measurements))


def test_selectors_are_drawn_and_listed_by_head(made: Callable[..., Inputs]) -> None:
    inputs = made()
    assert len(list(drawings(inputs)["scatter3"].iter("circle"))) == 6
    shares = ("92.0%", "70.0%", "82.0%", "60.0%", "70.0%", "40.0%")
    row = "".join(f'<td class="num">{cell}</td>' for cell in ("3", "1", *shares, "210", "402"))
    assert row in render_report(*inputs)


def test_selectors_are_shown_without_sinks_as_blocks_and_beside_a_perfect_one(made: Callable[..., Inputs]) -> None:
    page = render_report(*made())
    for row in (
        ("without sinks", "81.0%", "59.0%"),
        ("without sinks and recent tokens: what was chosen", "71.0%", "41.0%"),
        ("blocks of 64, by the same scores", "701", "990", "97.5%"),
        ("tokens, by the true attention", "56", "88", "96.5%"),
        ("index keys", "512 KiB", "4.2%"),
        ("together", "6.50 MiB", "54.2%"),
    ):
        cells = "".join(f'<td class="num">{cell}</td>' for cell in row[1:])
        assert f"<td>{row[0]}</td>{cells}" in page, row
    assert "sums of dropped tokens" not in page
    for number in ("640 KiB", "1.62 MiB", "1.25 MiB", "130.0%"):  # what a step reads at 640 tokens
        assert f'<td class="num">{number}</td>' in page, number
    assert "33.0% of the mass lies on other tokens" in page
    assert "Break-even: about 1,024 tokens. These are bytes, not time." in page
    assert '<td class="num">–</td>' in page  # a head without a row that could find anything


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"tokens": 700.0, "bound": "at most"}, "700 tokens at most, the shortest context measured"),
        ({"tokens": 2048.0, "bound": "above"}, "above 2,048 tokens, the longest context measured"),
        (None, "no context beyond the dense ones was measured"),
    ],
    ids=["pays already", "does not pay", "not measured"],
)
def test_break_even_says_what_was_not_measured(found: Any, words: str, made: Callable[..., Inputs]) -> None:
    inputs = made()
    inputs.passing("rtpurbo")["selector"]["break_even"] = found
    assert f"Break-even: {words}." in read(inputs).words


def test_unmeasured_selectors_leave_their_section_out(made: Callable[..., Inputs]) -> None:
    inputs = made(share=False)
    inputs.passing("rtpurbo")["selector"] = {"summary": {}, "heads": [], "contexts": []}
    inputs.measurements["gate"]["selector"] = {}
    reader = read(inputs)
    assert "selectors" not in reader.sections
    assert "The selectors were not measured" in reader.words
    assert "mass recall" not in reader.words


def test_training_may_be_left_out(made: Callable[..., Inputs]) -> None:
    inputs = made()
    inputs.passing("rtpurbo")["stage1"].update(losses=[], kl_trained=2.4)
    assert "2.400 nats a head; no training followed." in read(inputs).words


def test_losses_that_are_no_numbers_are_said_and_not_drawn(made: Callable[..., Inputs]) -> None:
    inputs = made()
    inputs.passing("rtpurbo")["stage1"]["losses"] = [2.0, 1.5, math.nan, math.nan]
    inputs.passing("indexcache")["flips"][1].update(loss=math.inf, trials={"4": math.nan, "5": math.inf})
    inputs.measurements["gate"]["loss"] = math.nan
    assert not re.search(r'="[^"]*\b(nan|inf)\b', "".join(map(_source, drawings(inputs).values())))
    assert "no number from step 3 on" in read(inputs).words


def test_sharing_shows_flips_relative_to_none_and_what_the_search_saved(made: Callable[..., Inputs]) -> None:
    page, words = render_report(*made()), read(made()).words
    assert "2.0000 to 2.0100 nats a token (+0.50%)" in words
    assert "40 layer evaluations, where the plain search takes 100 (−60%)" in words
    row = "".join(f'<td class="num">{cell}</td>' for cell in ("2", "5", "+0.500%", "+0.300%"))
    assert row in page
    assert "layer 4: +1.000%" in page  # sensitivity: the first round's trial
    assert "budget (+2.00%)" in words


def test_no_flips_leave_the_pattern(made: Callable[..., Inputs]) -> None:
    inputs = made()
    inputs.passing("indexcache").update(flips=[], pattern="FFFF", loss_after=2.0, layer_evaluations_plain=0)
    words = read(inputs).words
    assert "FFFF" in words
    assert "Loss after each flip" not in words


def test_noise_is_the_largest_gain_of_any_candidate() -> None:
    search = _search_measured()
    assert noise(search) == 0.0
    search["flips"][0]["trials"]["5"] = 1.996
    search["flips"][1]["trials"]["4"] = 2.003
    assert noise(search) == pytest.approx(0.002)


def test_nothing_to_warn_of_is_said(made: Callable[..., Inputs]) -> None:
    inputs = made()
    inputs.passing("rtpurbo")["window"] = 8192
    assert cautions(inputs.plan, inputs.measurements) == []
    words = read(inputs).words
    assert "No check raised one." in words
    assert "at the end of this page" not in words


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("gate.selector.recall_mean", 0.88, "selectors find 88.0%"),
        ("gate.context", 1000, "shorter than two windows of 512"),
        ("gate.windows", 1, "one held-out window (1,022 scored tokens)"),
        ("gate.loss", -0.01, "that is chance"),
        ("gate.artifact.kv_bytes", 13 << 20, "cache is not smaller than dense"),
        ("rtpurbo.rank_stability.jaccard", 0.4, "agree on only 40%"),
        ("rtpurbo.causal_check.dense", 0.1, "copies only 10.0%"),
        ("rtpurbo.selector.heads.0.recall_mean", 0.5, "1 of 6; the worst (layer 1, head 0) finds 50.0%"),
        ("rtpurbo.stage1.kl_trained", 2.5, "did not improve the indexers"),
        ("rtpurbo.readable", 9000, "nothing beyond 2,048 was judged"),
        ("rtpurbo.window", 128, "128 tokens, not the paper's 8,192: scaled down because the model reads 2,048"),
        ("indexcache.flips.0.trials.5", 1.99, "2 of 2 flips changed the loss by no more than 0.50%"),
        ("indexcache.loss_after", 1.99, "Sharing lowered the loss (−0.50%)"),
        ("indexcache.stopped", "budget", "ended at its loss budget"),
        ("calibration.spec", "builtin", "Python's own documentation"),
        ("calibration.cut", True, "parts of one document"),
    ],
)
def test_measurements_raise_warnings(made: Callable[..., Inputs], path: str, value: Any, said: str) -> None:
    inputs = made()
    inputs.passing("rtpurbo")["window"] = 8192
    assert not any(said in text for text in cautions(inputs.plan, inputs.measurements))
    first, *keys, last = path.split(".")
    place: Any = inputs.measurements[first] if first in inputs.measurements else inputs.passing(first)
    for key in keys:
        place = place[int(key) if isinstance(place, list) else key]
    place[last] = value
    found = cautions(inputs.plan, inputs.measurements)
    assert any(said in text for text in found), found
    assert said in read(inputs).words


def test_plans_that_evict_nothing_are_warned_of(made: Callable[..., Inputs]) -> None:
    inputs = made(share=False)
    layers = [layer.model_dump() | {"heads": (1, 0, 1, 0), "index": "full"} for layer in inputs.plan.layers]
    found = cautions(inputs.plan.edit(layers=layers), inputs.measurements)
    assert any("No KV head is evicted" in text for text in found)


def test_hostile_strings_are_shown_and_not_run(made: Callable[..., Inputs]) -> None:
    inputs = made()
    inputs.manifest["source"].update(spec=HOSTILE, base_model=None, revision=HOSTILE)
    inputs.manifest["recipe"]["calibration"] = HOSTILE
    inputs.measurements["calibration"].update(spec=HOSTILE, made_of=HOSTILE, cut=True, cut_document=HOSTILE)
    assert HOSTILE in inputs.measurements["calibration"]["near_duplicates"]["largest"]
    inputs.measurements["gate"].update(passed=False, failures=[HOSTILE])
    inputs.measurements["passes"][1]["name"] = HOSTILE
    reader = read(inputs)
    assert "script" not in reader.tags
    assert reader.words.count('<script>alert("x")</script>') >= 6


def test_report_is_the_same_for_the_same_input(made: Callable[..., Inputs]) -> None:
    inputs = made()
    before = copy.deepcopy(inputs)
    page, card = render_report(*inputs), model_card(*inputs)
    assert inputs == before
    stored = Inputs(
        Plan.parse(json.loads(json.dumps(inputs.plan.to_json()))),
        json.loads(json.dumps(inputs.measurements)),
        json.loads(json.dumps(inputs.manifest)),
    )
    assert render_report(*stored).encode() == page.encode()
    assert model_card(*stored).encode() == card.encode()


def test_report_shows_text_recipe_and_commands(made: Callable[..., Inputs]) -> None:
    inputs = made()
    words = read(inputs).words
    assert yaml.safe_dump(inputs.manifest["recipe"], sort_keys=False, allow_unicode=True) in words
    assert commands(inputs.manifest) in words
    assert inputs.measurements["calibration"]["digest"] in words
    assert "3 windows of 2,048 tokens, 256 rows of each" in words
    assert "Seed 7" in words


def test_commands_carry_revision_device_and_quotes(made: Callable[..., Inputs]) -> None:
    manifest = made().manifest
    assert commands(manifest).splitlines() == [
        "sparsec inspect . --recipe > recipe.yaml",
        "sparsec compile models/base --recipe recipe.yaml -o out",
    ]
    manifest["source"].update(spec="my models; rm", revision="abc")
    manifest.update(device="cuda", dtype="bfloat16")
    assert commands(manifest).splitlines()[1] == (
        "sparsec compile 'my models; rm' --recipe recipe.yaml -o out --revision abc --device cuda --dtype bfloat16"
    )


def test_card_carries_base_model_license_and_passes(made: Callable[..., Inputs]) -> None:
    card = model_card(*made())
    found = front_matter(card)
    (index,) = found.pop("model-index")
    values = [metric["value"] for result in index["results"] for metric in result["metrics"]]
    gate = made().measurements["gate"]
    assert values[:2] == [gate["artifact"]["bits_per_byte"], gate["dense"]["bits_per_byte"]]
    assert found == {
        "base_model": "someone/base",
        "license": "apache-2.0",
        "library_name": "sparsec",
        "pipeline_tag": "text-generation",
        "tags": ["sparse-attention", "long-context", "rtpurbo", "indexcache"],
    }
    assert yaml.safe_load(ModelCard(card).data.to_yaml()) == front_matter(card)


def test_card_claims_no_license_that_the_source_does_not_state(made: Callable[..., Inputs]) -> None:
    inputs = made()
    inputs.manifest["source"].update(license=None, base_model=None)
    card = model_card(*inputs)
    assert not {"license", "base_model"} & front_matter(card).keys()
    assert "The source states no license" in card
    assert "`models/base` with the same weights" in card


def test_card_says_what_was_measured_and_what_was_not(made: Callable[..., Inputs]) -> None:
    card = model_card(*made())
    for said in (
        "| bits per byte | 0.8000 | 0.8080 | +1.00% |",
        "| KV cache resident | 12.0 MiB | 7.00 MiB | −41.7% |",
        "| attention mass found (recall), mean | 100% | 93.4% |  |",
        "| tokens kept by a retrieval head, mean | 1,792 | 222 | −87.6% |",
        "6 of 24 query heads",
        "FSFS on layers 1, 3, 4, 5",
        "Without `import sparsec`, stock Transformers opens this folder as the plain dense model",
        "held-out part of the calibration text only",
        "Contexts longer than 2,048 tokens were not judged",
        "On a CUDA GPU Triton's kernels run this plan, elsewhere the PyTorch reference does: memory really saved. "
        "No speed is claimed here: sparsec bench measures it where it is to run.",
        "sparsec inspect . --recipe > recipe.yaml\nsparsec compile models/base --recipe recipe.yaml -o out",
    ):
        assert said in card, said


def test_trained_weights_are_shown_and_never_called_the_base_models(made: Callable[..., Inputs]) -> None:
    page, card = read(made(train=True)).words, model_card(*made(train=True))
    for said in ("those of step 2, the best: 0.0600 nats a row, −50%", "Opened densely", "after rtpurbo", "+2.50%"):
        assert said in page, said
    assert "a dense model with the trained weights, which is not the base model" in card
    assert "with weights trained for it" in card
    nothing = made(train=True)
    nothing.passing("distill").update(best_step=0, kl_best=0.12, diverged=True)
    page = read(nothing).words
    assert "Nothing that was trained did better" in page
    assert "Training ended at step 4, where the loss was no number" in page


def test_card_of_a_split_without_selectors_has_no_recall(made: Callable[..., Inputs]) -> None:
    card = model_card(*made(share=False, split=False))
    assert "recall" not in card
    assert "24 of 24 query heads read the whole context" in card


def test_hostile_strings_cannot_break_the_card(made: Callable[..., Inputs]) -> None:
    inputs = made()
    inputs.manifest["source"].update(spec=f"```\n{HOSTILE}", base_model=f"a\n---\nb: {HOSTILE}", license="x: [y\n---")
    inputs.measurements["calibration"].update(spec=HOSTILE, made_of=HOSTILE)
    card = model_card(*inputs)
    data = yaml.safe_load(ModelCard(card).data.to_yaml())
    assert data["license"] == "x: [y\n---"
    assert data["base_model"] == f"a\n---\nb: {HOSTILE}"
    body = card.partition("\n# ")[2]
    prose = re.sub(r"(?s)(`{3,}).*?\n\1", "", body)  # without code blocks
    prose = re.sub(r"(`+) ?.*?(?<!`)\1(?!`)", "", prose)  # and code in lines
    assert "<script" not in prose
    headings = re.findall(r"(?m)^#+ .*", prose)
    assert len(headings) == 7 - 1  # the first one is cut off above


def test_numbers_have_signs_units_and_no_false_zero() -> None:
    assert (change(0.0123), change(-0.3517, 1), change(-0.000001)) == ("+1.23%", "−35.2%", "0.00%")
    assert (percent(0.9136), percent(-0.01)) == ("91.4%", "−1.0%")
    assert (size(900), size(12 << 20), size(5 * 2**30)) == ("900 B", "12.0 MiB", "5.00 GiB")
    assert (plural(1, "window"), plural(12345, "window")) == ("1 window", "12,345 windows")
