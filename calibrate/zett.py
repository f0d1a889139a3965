"""Embeddings of merged tokens by a hypernetwork of ZeTT (Minixhofer et al., arXiv 2405.07883), where there is one.

Written after the authors' PyTorch port (``hf_hypernet`` of bminixhofer/zett): a token's surface form, in tokens of the
base vocabulary (at most ``hn_surface_maxlen``, the first ones), gives their (input, output) embeddings, rescaled; a
projection with a residual block, RoBERTa's encoder, the state of the first one (or all of them); a residual block and a
projection, rescaled, give the token's input and output embeddings. The output embedding is not used here: it imitates
tokens of a vocabulary, where merged_output.py needs a joint probability.

A hypernetwork serves one base model. What is opened has to be in safetensors and to have that model's width,
vocabulary, token by token, and embeddings (tied or not). Hypernetworks that need a language, or priors, are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaModel

from sparsec.errors import SourceError
from sparsec.plugins.byte_level import ByteLevel

WEIGHTS = "model.safetensors"
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", WEIGHTS)
CHUNK = 1024
UNKNOWN = {  # what a hypernetwork may want and is not given here
    "hn_embed_lang_id": "a language",
    "hn_embed_target_priors": "priors of the tokens",
    "hn_add_inter_token_attention": "attention between tokens",
}


class _Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.dense1, self.dense2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.ln = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """A residual block, [..., width]."""
        gelu = nn.GELU(approximate="tanh")
        out: Tensor = self.ln(gelu(self.dense2(gelu(self.dense1(x)))) + x)
        return out


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.w, self.b = (nn.Parameter(torch.ones(1, width), requires_grad=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """An affine map by dimension."""
        return self.w * x + self.b


class ZettNetwork(nn.Module):
    """[tokens, longest] surface forms -> float32 [tokens, width] input embeddings. Names are the checkpoints'."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        width, inside, inner = (int(config[key]) for key in ("n_embd", "hn_hidden_size", "hn_intermediate_size"))
        separate, single = bool(config.get("separate_out_embeddings")), bool(config.get("hn_single_head"))
        self.inputs, self.width = 2 * width if separate else width, width
        concat = bool(config.get("hn_concat_last_hidden_state"))
        if concat:
            raise SourceError("this hypernetwork concatenates its states, which no published one does: train one here")
        self.model = RobertaModel(
            RobertaConfig(
                vocab_size=int(config["pad_token_id"]) + 1,
                hidden_size=inside,
                intermediate_size=inner,
                num_hidden_layers=int(config["hn_n_layers"]),
                num_attention_heads=int(config.get("hn_num_attention_heads") or inside // 64),
                pad_token_id=int(config["pad_token_id"]),
                max_position_embeddings=514,  # with the next two, as in roberta-base and xlm-roberta-base
                type_vocab_size=1,
                layer_norm_eps=1e-5,
            ),
            add_pooling_layer=False,
        )
        self.fallback_embeddings = nn.Embedding(max(int(config.get("hn_n_extra_tokens") or 0), 1), self.inputs)
        self.input_projection = nn.Sequential(nn.Linear(self.inputs, inside), _Block(inside, inner))
        out = self.inputs if single else width
        self.output_projection = nn.Sequential(_Block(inside, inner), nn.Linear(inside, out))
        if separate and not single:
            self.output_projection_out = nn.Sequential(_Block(inside, inner), nn.Linear(inside, width))
        self.rescaled = bool(config.get("hn_rescale_embeddings"))
        if self.rescaled:
            self.in_scaler, self.scaler = _Scale(self.inputs), _Scale(width)
            if separate:
                self.out_scaler = _Scale(width)
        if config.get("hn_predict_bias", True):
            self.bias_projection = nn.Linear(inside, 1)

    def forward(self, forms: Tensor, source: Tensor) -> Tensor:
        """forms: int64 [tokens, longest]; source: [vocabulary, inputs], the base model's embeddings."""
        size = int(self.config["original_vocab_size"])
        pieces = source[forms.clamp_max(size - 1)].float()
        if self.rescaled:
            pieces = self.in_scaler(pieces)
        odd = forms >= size
        pieces = torch.where(odd[..., None], self.fallback_embeddings((forms - size).clamp_min(0)), pieces)
        real = forms != int(self.config["pad_token_id"])
        places = torch.arange(forms.shape[1], device=forms.device).expand_as(forms)
        states = self.model(
            inputs_embeds=self.input_projection(pieces), attention_mask=real.long(), position_ids=places
        ).last_hidden_state
        found: Tensor = self.output_projection(states[:, 0])[..., : self.width]
        return self.scaler(found) if self.rescaled else found


@dataclass(frozen=True)
class Zett:
    """An opened hypernetwork."""

    network: ZettNetwork
    tokenizer: Tokenizer

    @torch.no_grad()
    def rows(self, words: Sequence[str], table: Tensor, head: Tensor, tied: bool) -> Tensor:
        """Input embeddings of tokens as a byte-level vocabulary spells them: float32 [tokens, width], on the CPU."""
        config = self.network.config
        longest, pad = int(config["hn_surface_maxlen"]), int(config["pad_token_id"])
        forms = torch.full((len(words), longest), pad)
        for row, word in enumerate(words):
            ids = [piece.id for piece in self.tokenizer.model.tokenize(word)][:longest]
            forms[row, : len(ids)] = torch.tensor(ids)
        source = table if tied else torch.cat([table, head], 1)
        network = self.network.to(table.device)
        return torch.cat([network(part.to(table.device), source).float().cpu() for part in torch.split(forms, CHUNK)])


def open_zett(spec: str, base: ByteLevel, width: int, rows: int, tied: bool) -> Zett:
    """Open a hypernetwork for a base model.

    Args:
        spec: a folder, or a name on the Hub.
        base: the base model's tokenizer.
        width, rows, tied: of its embedding.

    Raises:
        SourceError: it is not there, in no safetensors, damaged, of a kind that is not run, or another model's.
    """
    folder = _folder(spec)
    other = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pkl", ".msgpack", ".h5"))
    if not (folder / WEIGHTS).is_file():
        found = f"has {other[0]}, no" if other else "has no"
        raise SourceError(f"the hypernetwork {spec} {found} {WEIGHTS}: convert it to safetensors, or train one here")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        words = tokenizer.get_vocab()
        _check(spec, config, words, base, width, rows, tied)
        network = ZettNetwork(config)
        weights = load_file(folder / WEIGHTS)
        network.load_state_dict({name: value for name, value in weights.items() if "position_ids" not in name})
    except SourceError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise SourceError(f"the hypernetwork {spec} cannot be opened ({reason}): is it one of ZeTT's?") from None
    return Zett(network.eval().requires_grad_(False), tokenizer)


def _folder(spec: str) -> Path:
    if Path(spec).is_dir():
        return Path(spec)
    try:
        return Path(snapshot_download(spec, allow_patterns=list(FILES)))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())[:120]
        raise SourceError(
            f"there is no hypernetwork {spec} ({reason}): name a folder or one on the Hub, or train one here"
        ) from None


def _check(
    spec: str, config: Mapping[str, Any], words: Mapping[str, int], base: ByteLevel, width: int, rows: int, tied: bool
) -> None:
    way_out = "take prediction=hypernetwork, which trains one here"
    if config.get("model_type") != "zett_hypernetwork" or config.get("hn_model_type", "roberta") != "roberta":
        raise SourceError(f"{spec} is a {config.get('model_type')}, no hypernetwork of ZeTT: {way_out}")
    if not config.get("hn_embed_using_source_embeddings"):
        raise SourceError(f"the hypernetwork {spec} does not read the base model's embeddings: {way_out}")
    for key, what in UNKNOWN.items():
        if config.get(key):
            raise SourceError(f"the hypernetwork {spec} needs {what}, which nothing here gives it: {way_out}")
    theirs = (int(config["n_embd"]), int(config["original_vocab_size"]), not config.get("separate_out_embeddings"))
    if (theirs[0], theirs[2]) != (width, tied) or not base.size <= theirs[1] <= rows:  # rows may fill the matrix up
        ours, other = (f"{r} x {w}, {'tied' if t else 'untied'}" for w, r, t in ((width, rows, tied), theirs))
        raise SourceError(f"the hypernetwork {spec} is for embeddings of {other}, this model has {ours}: {way_out}")
    for word, token in base.vocabulary.items():
        if token not in base.added and words.get(word) != token:
            raise SourceError(f"the hypernetwork {spec} is for another tokenizer (token {token}, {word!r}): {way_out}")
