"""Merged tokens: mined as they should be, written into an ordinary tokenizer, read back as they went in."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

import sparsec
from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.decode import decode_logits
from sparsec.calibrate.merged_embeddings import estimate, never_sampled
from sparsec.calibrate.merges import Mined, mine_text, saved_share
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.token_report import compare, script
from sparsec.compiler.source import Source, load_tokenizer
from sparsec.errors import CalibrationError, PlanError, SourceError, UsageError
from sparsec.export.tokenizer import broken, merged_tokenizer, with_description
from sparsec.plan import Plan
from sparsec.plugins.byte_level import ByteLevel, Pieces
from sparsec.plugins.merging import mine
from sparsec.plugins.vocabulary import INPUT, NEVER, read, unmerged

SCRIPTS = {
    "Latin": "The quick brown fox, of course, jumps over the lazy dog's back; naïve café — well-known.\n\n"
    "  def f(x):\n\treturn x_1\n",
    "Cyrillic": "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια.",
    "Arabic": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق.",
    "Hebrew": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "Devanagari": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
    "Han": "人人生而自由,在尊严和权利上一律平等。",
    "Japanese": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "Hangul": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "signs": "👩‍👩‍👧 é ǅ ﷽ \u200d\u200b\ufeff <|im_start|>user\nof the of the<|im_end|>",
}


@pytest.fixture(scope="module")
def tokenizer(demo_source: Source) -> Any:
    return load_tokenizer(demo_source)


@pytest.fixture(scope="module")
def calibration(tokenizer: Any) -> Calibration:
    return Calibration(read_corpus(), tokenizer)


@pytest.fixture(scope="module")
def mined(calibration: Calibration) -> Mined:
    return mine_text(calibration, 1500, first=49152)


@pytest.fixture(scope="module")
def description(mined: Mined) -> dict[str, Any]:
    return merged_tokenizer(mined.base, mined.merges, mined.boundary)


@pytest.fixture(scope="module")
def merged(tokenizer: Any, description: dict[str, Any]) -> Any:
    return with_description(tokenizer, description)


class Letters:
    """Rules that allow everything."""

    def allow(self, left: int, right: int) -> bool:
        return True

    def add(self, left: int, right: int, token: int) -> None:
        pass


def plainly(sequences: list[list[int]], count: int, first: int) -> list[tuple[int, int, int]]:
    """The authors' way: count all pairs anew for every merge. Ties: the smaller ids."""
    found = []
    for token in range(first, first + count):
        pairs: Counter[tuple[int, int]] = Counter()
        for ids in sequences:
            at = 0
            last: tuple[int, int, int] | None = None
            for at in range(len(ids) - 1):
                pair = (ids[at], ids[at + 1])
                if last is not None and last[:2] == pair and last[2] == at - 1 and pair[0] == pair[1]:
                    last = None  # overlaps the one before
                    continue
                pairs[pair] += 1
                last = (*pair, at)
        pairs = Counter({pair: n for pair, n in pairs.items() if n > 1})
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        found.append((*best, token))
        for ids in sequences:
            at = 0
            while at < len(ids) - 1:
                if (ids[at], ids[at + 1]) == best:
                    ids[at : at + 2] = [token]
                at += 1
    return found


@pytest.mark.parametrize("seed", range(5))
def test_mining_finds_what_counting_anew_finds(seed: int) -> None:
    rng = random.Random(seed)
    sequences = [[rng.choice([0, 0, 0, 1, 2, 3]) for _ in range(200)] for _ in range(4)]
    given_ = [(np.array(ids), np.zeros(len(ids), dtype=np.int64)) for ids in sequences]
    found = mine(given_, 30, 10, Letters())  # type: ignore[arg-type]
    assert [(m.left, m.right, m.token) for m in found] == plainly([list(ids) for ids in sequences], 30, 10)


def test_merges_save_what_they_say(mined: Mined, calibration: Calibration) -> None:
    found = saved_share(mined, calibration.tokenizer, [one.text for one in calibration.texts("train")])
    assert found["base_tokens"] == mined.tokens
    # Applied in ranks instead of one after the other over the whole text it comes to the same.
    assert found["base_tokens"] - found["merged_tokens"] == sum(mined.saved)


def test_the_tokenizer_gives_what_the_merger_gives(merged: Any, mined: Mined, calibration: Calibration) -> None:
    merger, pieces = mined.merger()
    for text in [*SCRIPTS.values(), *(one.text for one in calibration.texts("heldout"))]:
        ids = calibration.tokenizer(text, verbose=False)["input_ids"]
        assert merged(text, verbose=False)["input_ids"] == merger(ids, pieces(ids))[0]


def test_without_its_merges_it_is_the_base_tokenizer(merged: Any, calibration: Calibration) -> None:
    plain = unmerged(merged, 49152)
    for text in [*SCRIPTS.values(), *(one.text for one in calibration.texts("heldout"))]:
        assert plain(text, verbose=False)["input_ids"] == calibration.tokenizer(text, verbose=False)["input_ids"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_text_comes_back(script: str, description: dict[str, Any]) -> None:
    assert broken(description, [SCRIPTS[script] * 3]) is None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(max_size=200)
    | st.lists(st.sampled_from([" ", "of", "the", ",", "\n", "\u0301", "न", "ि", "é", "'s"])).map("".join)
)
def test_any_text_comes_back(text: str, fast: Tokenizer, base: Tokenizer) -> None:
    # SmolLM2's vocabulary lacks some bytes: what it loses is lost before any merge.
    read = base.decode(base.encode(text).ids, skip_special_tokens=False)
    assert fast.decode(fast.encode(text).ids, skip_special_tokens=False) == read


@pytest.fixture(scope="module")
def base(mined: Mined) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(mined.base.description))


@pytest.fixture(scope="module")
def fast(description: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(description))


def test_special_tokens_stay_whole_and_alone(merged: Any, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "What is the meaning of the word?"}, {"role": "assistant", "content": "of the"}]
    before = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    after = merged.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    special = set(tokenizer.all_special_ids)
    assert [i for i in before if i in special] == [i for i in after if i in special]
    assert len(after) < len(before)
    assert merged.decode(after) == tokenizer.decode(before)


def test_merged_tokens_are_valid(mined: Mined, tokenizer: Any) -> None:
    assert len(set(mined.spelling)) == len(mined.merges)
    for data in mined.spelling:
        assert b"\n\n" not in data
        assert b"  " not in data or not data.strip()
        assert data.strip() == data.lstrip() or not data.strip(), data  # a space ahead, as words have, none behind
    known = {data for data in mined.base.bytes_of if data is not None}
    assert not known & set(mined.spelling)


def test_narrow_merges_stay_inside_a_pretoken(calibration: Calibration) -> None:
    narrow = mine_text(calibration, 200, first=49152, boundary="pretoken")
    assert all(data.count(b" ") <= 1 or not data.strip() for data in narrow.spelling)
    assert all(b" " not in data[1:] or not data.strip() for data in narrow.spelling)


def test_a_merge_that_takes_a_special_token_is_refused(mined: Mined) -> None:
    with pytest.raises(SourceError, match="swallow the special token 1"):
        merged_tokenizer(mined.base, [(1, 300, 49152)], "phrase")


def test_a_merge_into_a_known_token_is_refused(mined: Mined) -> None:
    left, right = mined.base.parts[500]
    with pytest.raises(SourceError, match="there already"):
        merged_tokenizer(mined.base, [(left, right, 49152)], "phrase")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["model"].update(type="Unigram"), "not byte-level"),
        (lambda d: d["model"].update(byte_fallback=True), "not byte-level"),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "changes text"),
        (lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "a space before texts"),
    ],
)
def test_tokenizers_that_lose_text_are_refused(mined: Mined, change: Callable[[Any], None], says: str) -> None:
    description = json.loads(json.dumps({**mined.base.description, "model": {**mined.base.description["model"]}}))
    change(description)
    with pytest.raises(SourceError, match=says) as caught:
        ByteLevel(description)
    assert "byte-level BPE tokenizers without normalizer fit" in str(caught.value)


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(SourceError, match="no fast backend"):
        ByteLevel.of(object())


def test_whole_pretokens_past_merges_are_not_widened(mined: Mined) -> None:
    model = {**mined.base.description["model"], "ignore_merges": True}
    with pytest.raises(UsageError, match="take boundary=pretoken"):
        ByteLevel({**mined.base.description, "model": model}).splitting("phrase")


def test_pieces_of_a_window_that_cuts_characters(mined: Mined, tokenizer: Any) -> None:
    ids = tokenizer(SCRIPTS["Japanese"])["input_ids"]
    pieces = Pieces(mined.base, "pretoken")
    for start in range(6):
        found = pieces(ids[start:-1])
        assert len(found) == len(ids) - start - 1
        assert (np.diff(found[found >= 0]) >= 0).all()


def test_too_little_text_is_refused(calibration: Calibration) -> None:
    with pytest.raises(CalibrationError, match="name more text"):
        mine_text(calibration, 5, first=49152, least=10**6)


def test_heuristics_are_means_of_what_they_say() -> None:
    torch.manual_seed(0)
    table = torch.randn(50, 8)
    parts, lengths = [(1, 2), (3, 4, 5)], [(2, 2), (1, 5, 3)]
    mean = estimate("mean", table, parts, lengths)
    assert torch.allclose(mean[0], table[[1, 2]].mean(0))
    local, far = (estimate(kind, table, parts, lengths) for kind in ("local", "global"))  # type: ignore[arg-type]
    assert torch.allclose(estimate("hybrid", table, parts, lengths), 0.7 * local + 0.3 * far, atol=1e-6)
    # The longest piece weighs most, where likeness is the same.
    same = table.clone()
    same[3:6] = table[3]
    assert torch.allclose(estimate("local", same, parts, lengths)[1], table[3], atol=1e-5)


def test_the_row_that_is_never_sampled_is_far_below_all_others() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(400, 16) + 2.0, torch.randn(60, 16)
    row = never_sampled(hidden[:200], head)
    fresh = hidden[200:]
    assert float(((fresh @ head.T).max(-1).values - fresh @ row).min()) > 40


@pytest.fixture(scope="module")
def extended(tiny_llama: Path) -> tuple[Any, Plan, dict[str, torch.Tensor]]:
    """A small model, a plan with three merged tokens, and their tensors."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval().requires_grad_(False)
    from sparsec.plugins.families import base_plan

    rows, width = model.get_input_embeddings().weight.shape
    plan = base_plan(model.config, "test").edit(
        vocabulary={"mode": "static", "base": rows, "merged": 3, "rows": 320, "width": width, "boundary": "phrase"}
    )
    torch.manual_seed(0)
    return model, plan, {INPUT: torch.randn(3, width), NEVER: torch.randn(width)}


def test_an_installed_vocabulary_reads_its_rows_and_leaves_none(extended: Any) -> None:
    model, plan, tensors = extended
    ids = torch.arange(3, 40)[None]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    dense = model(input_ids=ids, use_cache=False).logits
    with sparsec.applied(model, plan, tensors):
        assert model.get_input_embeddings().weight.shape[0] == 320
        assert torch.allclose(model(input_ids=ids, use_cache=False).logits[..., :272], dense, atol=1e-5)
        assert torch.equal(model.get_input_embeddings()(torch.tensor([272])), tensors[INPUT][:1])
        with sparsec.applied(model, plan.edit(vocabulary=None), {}):  # another plan for a while
            assert model.get_input_embeddings().weight.shape[0] == 272
        assert torch.equal(model.get_input_embeddings().weight[272:275], tensors[INPUT])
    assert {name: weight.shape for name, weight in model.state_dict().items()} == {
        n: w.shape for n, w in before.items()
    }
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert model.config.vocab_size == 272


def test_a_model_of_another_size_is_refused(extended: Any) -> None:
    model, plan, tensors = extended
    other = plan.edit(vocabulary={**plan.vocabulary.model_dump(), "base": 100})
    with pytest.raises(PlanError, match="use the checkpoint it was compiled from"):
        sparsec.install(model, other, tensors)


def test_plans_without_merged_tokens_are_what_they_were(extended: Any) -> None:
    _, plan, _ = extended
    plain = plan.edit(vocabulary=None)
    assert "vocabulary" not in plain.to_json()
    assert Plan.parse(plain.to_json()) == plain
    assert plan.digest != plain.digest


@pytest.fixture(scope="module")
def artifact(cli: Any, tiny_deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model compiled with merged tokens and windows on top."""
    out = tmp_path_factory.mktemp("merged") / "out"
    options = {"merges": 200, "prediction": "mean"}
    settings_ = [f"--set=dynamic-tokenization.{name}={value}" for name, value in options.items()]
    gate = ["--set=window.window=64", "--set=gate.max_loss=9", "--set=gate.context=256", "--set=gate.rows=64"]
    result = cli(
        "compile", str(tiny_deep), "--passes", "window,dynamic-tokenization", *settings_, *gate, "-o", str(out)
    )
    assert result.status == 0, result.err
    return out


def test_stock_transformers_opens_it_as_an_ordinary_model(artifact: Path) -> None:
    config = json.loads((artifact / "config.json").read_text())
    assert config["vocab_size"] % 64 == 0
    assert config["tie_word_embeddings"] is False
    model, tokenizer = sparsec.load(artifact)
    assert [each.name for each in model.sparsec_plan.passes] == ["dynamic-tokenization", "window"]
    from transformers import LlamaForCausalLM

    stock, info = LlamaForCausalLM.from_pretrained(artifact, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    text = AutoTokenizer.from_pretrained(artifact)("the value of the function is the same", return_tensors="pt")
    assert (text["input_ids"] >= 272).any()
    out = stock.generate(**text, max_new_tokens=20, do_sample=True, temperature=5.0)
    assert (out[:, text["input_ids"].shape[1] :] < 272).all()  # no merged token and no filling is ever written
    assert tokenizer.decode(text["input_ids"][0]) == "the value of the function is the same"


def test_prompts_are_read_merged_and_answers_are_base_tokens(artifact: Path, tiny_deep: Path) -> None:
    model, tokenizer = sparsec.load(artifact)
    base = AutoTokenizer.from_pretrained(tiny_deep)
    ids = base("the value of the function is the same as the type of the object", return_tensors="pt")["input_ids"]
    found, mask = read(model, torch.cat([ids, ids]))
    assert found.shape[1] < ids.shape[1]
    assert mask.all()
    assert found[0].tolist() == tokenizer(base.decode(ids[0]))["input_ids"]
    logits, resident = decode_logits(model, torch.cat([ids, ids]), 40)
    assert logits.shape[:2] == (2, ids.shape[1] - 40)
    assert torch.allclose(logits[0], logits[1])
    assert resident > 0


def test_a_second_turn_goes_on_with_the_ids_of_the_first(artifact: Path) -> None:
    model, tokenizer = sparsec.load(artifact)
    cache = DynamicCache(config=model.config)
    prompt = tokenizer("the value of the function is the same", return_tensors="pt")["input_ids"]
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    first = model.generate(prompt, past_key_values=cache, **options)
    # The model writes base tokens. Read again as text they could merge, into ids that are not in the cache.
    transcript = torch.cat([first, tokenizer(" and the type of the object", return_tensors="pt")["input_ids"]], dim=1)
    second = model.generate(transcript, past_key_values=cache, **options)
    assert torch.equal(second[:, : transcript.shape[1]], transcript)
    assert cache.get_seq_length() == second.shape[1] - 1  # every id stands in it once


def test_eval_reads_the_same_text_with_both_tokenizers(artifact: Path, cli: Any, tmp_path: Path) -> None:
    result = cli(
        "eval",
        str(artifact),
        "--lengths",
        "256",
        "--prompts",
        "0",
        "--windows",
        "1",
        "--systems",
        "dense,artifact",
        "-o",
        str(tmp_path / "eval.json"),
    )
    assert result.status == 0, result.err
    dense, own = json.loads((tmp_path / "eval.json").read_text())["cells"]
    assert dense["bytes"] == own["bytes"]
    assert own["kv_bytes"] < dense["kv_bytes"]


def test_the_report_shows_both_tokenizers(artifact: Path) -> None:
    page = (artifact / "report.html").read_text(encoding="utf-8")
    found = json.loads((artifact / "measurements.json").read_text())["passes"][0]["measured"]
    before, after = (found["tokenizer"]["texts"]["Latin"][which] for which in ("before", "after"))
    assert after["tokens"] < before["tokens"]
    assert after["bytes"] == before["bytes"]
    assert after["lost_lines"] == before["lost_lines"] == 0
    assert 1 - after["tokens"] / before["tokens"] == pytest.approx(found["heldout"]["saved"], abs=0.01)
    known = found["tokenizer"]["vocabulary"]
    assert known["after"]["tokens"] == known["before"]["tokens"] + found["merges"]
    assert known["after"]["duplicated"] == 0
    assert 0 < found["consistency"]["merged"]["same_next"] <= found["consistency"]["half"]["same_next"] <= 1
    assert "Merged tokens" in page
    assert f"{after['characters_a_token']:.2f}" in page


def test_a_tokenizer_report_counts_what_is_there(mined: Mined, description: dict[str, Any]) -> None:
    texts = {name: [SCRIPTS[name]] for name in ("Cyrillic", "Han", "Japanese", "Hangul")}
    assert {name: script(text[0]) for name, text in texts.items()} == {name: name for name in texts}
    found = compare(mined.base, ByteLevel(description), texts)
    words = len(SCRIPTS["Cyrillic"].split())
    one = found["texts"]["Cyrillic"]["before"]
    ids = mined.base.tokenizer().encode(SCRIPTS["Cyrillic"]).ids
    assert (one["words"], one["tokens"], one["fertility"]) == (words, len(ids), len(ids) / words)
    counts = Counter(ids)
    entropy = np.log(sum((n / len(ids)) ** 2.5 for n in counts.values())) / -1.5
    assert one["renyi_efficiency"] == pytest.approx(entropy / np.log(len(mined.base.vocabulary)))
    assert found["vocabulary"]["after"]["unreachable"] >= found["vocabulary"]["before"]["unreachable"]


def test_static_plans_say_nothing_of_batches(extended: Any) -> None:
    _, plan, _ = extended
    assert set(plan.to_json()["vocabulary"]) == {"mode", "base", "merged", "rows", "width", "boundary"}
