"""The plan: for every layer and query head, what runs. Pure data; the runtime needs it and the tensors, nothing else.

The semantics of every field are the execution contract (docs/execution-contract.md). The JSON schema in
docs/plan.md is printed from these classes.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from sparsec.errors import PlanError

FORMAT = 1
Unit = Literal["attention", "mlp"]
UNITS: tuple[Unit, ...] = ("attention", "mlp")  # of a layer, in the order they run
LARGEST = 2**31 - 1  # of all numbers in a plan
DEEPEST = 16  # lists and mappings inside of each other


class Strict(BaseModel):
    """Immutable data; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelShape(Strict):
    """The attention shape of the base model that the plan was made for."""

    model_type: str = Field(description="Transformers' model_type, e.g. llama")
    layers: int = Field(ge=1, le=4096, description="decoder layers")
    heads: int = Field(ge=1, le=4096, description="query heads a layer")
    kv_heads: int = Field(ge=1, le=4096, description="key-value heads a layer; divides heads")
    head_dim: int = Field(ge=1, le=4096, description="dimensions of a head")

    @property
    def group(self) -> int:
        """Query heads that read one KV head: query head h reads KV head h // group."""
        return self.heads // self.kv_heads

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads are no multiple of {self.kv_heads} KV heads")
        return self


class Window(Strict):
    """What a local head's query at token t sees: tokens t-size+1 .. t and 0 .. sinks-1."""

    size: int = Field(ge=1, description="tokens, the current one included")
    sinks: int = Field(ge=0, description="first tokens of the sequence that stay visible")
    compensate: bool = Field(
        default=False, description="all other tokens stand as one: mean key, mean value, weight times their number"
    )


class Coarse(Strict):
    """Blocks are ranked by their mean projected key first, tokens are scored only in the best ones (as HISA does)."""

    min_context: int = Field(ge=0, description="rows of at most so many tokens score all of them")
    one_in: int = Field(
        default=4, ge=2, le=1024, description="of so many blocks that a row sees one is scored, beside the forced ones"
    )


class Selector(Strict):
    """How a retrieval head chooses its keys: s = (Wq q)·(Wk k), softmax over all causal keys, top-p."""

    kind: Literal["lowrank"] = "lowrank"
    rank: int = Field(ge=1, le=1024, description="rows of Wq and Wk")
    rope: Literal["pre", "post"] = Field(description="q and k before or after the rotary embedding")
    top_p: float = Field(gt=0, le=1, description="kept share of the selector's softmax mass")
    granularity: Literal["token", "block"] = Field(description="what is kept or dropped as a whole")
    block: int = Field(ge=1, description="tokens a block; blocks start at multiples of it")
    sinks: int = Field(ge=0, description="first tokens that are always kept")
    recent: int = Field(ge=0, description="latest tokens that are always kept, the current one included")
    min_keep: int = Field(default=0, ge=0, description="at least so many tokens are kept beside the forced ones")
    scope: Literal["head", "kv_head", "layer"] = Field(
        default="head",
        description="head: each retrieval head its own set; kv_head: the union of those that read one KV head; "
        "layer: the union of all, one set a layer",
    )
    prefill: Literal["dense", "selector"] = Field(
        default="dense", description="prefill rows: all causal keys, or blocks of keys chosen for each query block"
    )
    query_block: int = Field(
        default=64, ge=1, le=1024, description="prefill rows that choose together; they start at multiples of it"
    )
    vote_every: int = Field(
        default=1, ge=1, le=1024, description="of these rows every so-manyth decides for all, the first one among them"
    )
    index_dtype: Literal["model", "fp8"] = Field(
        default="model",
        description="projected keys in the cache: its own dtype, or e4m3 with a scale a token and head, rank + 1 bytes",
    )
    coarse: Coarse | None = Field(default=None, description="null: every token is scored; of decode rows alone")

    @model_serializer(mode="wrap")
    def _without_default(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Fields that came later and say nothing here are not written: the digest stays."""
        data: dict[str, Any] = write(self)
        for name in ("vote_every", "index_dtype", "coarse"):
            if getattr(self, name) == type(self).model_fields[name].default:
                data.pop(name, None)
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.coarse is not None and (self.granularity != "block" or self.top_p >= 1):
            raise ValueError("a coarse level needs the selector's granularity to be 'block' and its top_p below 1")
        return self


class Hisa(Strict):
    """Blocks are ranked by their mean index key first, tokens only in the best ones (HISA, arXiv 2603.28458)."""

    block: int = Field(ge=1, description="tokens a block; blocks start at multiples of it")
    top_blocks: int = Field(
        ge=1, description="best blocks whose tokens are scored, beside the first and the query's own"
    )
    min_context: int = Field(default=0, ge=0, description="queries of at most so many tokens score all of them")


class Misa(Strict):
    """Each query scores tokens with its best indexer heads alone (MISA, arXiv 2605.07363)."""

    heads: int = Field(ge=1, description="indexer heads a query uses")
    block: int = Field(ge=1, description="tokens a block, whose mean index key ranks the heads")
    candidates: int | None = Field(
        default=None, ge=1, description="two stages: the best so many tokens are scored again with all heads"
    )
    min_context: int = Field(default=0, ge=0, description="queries of at most so many tokens use all heads")


class Dsa(Strict):
    """The model's own indexers (DeepSeek sparse attention): one set a layer for all its query heads, in prefill too."""

    top_k: int = Field(ge=1, description="tokens that a query attends to")
    heads: int = Field(ge=1, description="indexer heads")
    dim: int = Field(ge=1, description="dimensions of an indexer head, and of an index key")
    hisa: Hisa | None = Field(default=None, description="null: all tokens are scored")
    misa: Misa | None = Field(default=None, description="null: with all indexer heads")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hisa is not None and self.hisa.block * self.hisa.top_blocks < self.top_k:
            raise ValueError(
                f"{self.hisa.top_blocks} blocks of {self.hisa.block} hold fewer tokens than the {self.top_k} to choose"
            )
        if self.misa is not None and self.misa.heads > self.heads:
            raise ValueError(f"{self.misa.heads} heads are to be routed, an indexer has {self.heads}")
        if self.misa is not None and self.misa.candidates is not None and self.misa.candidates < self.top_k:
            raise ValueError(f"{self.misa.candidates} candidates are fewer than the {self.top_k} to be chosen")
        return self


class Routing(Strict):
    """A unit (a layer's attention or MLP) runs for a token, or its output is forecast (arXiv 2510.13831)."""

    width: int = Field(ge=1, description="of the model's hidden states, which forecasters and routers read")
    rank: int = Field(ge=0, le=65536, description="of the forecasters; 0: nothing is forecast, the unit adds nothing")
    activation: Literal["silu", "linear"] = Field(description="between a forecaster's two layers")
    hidden: int = Field(ge=0, le=65536, description="hidden units of a router, beside its linear part")
    threshold: float = Field(description="a token runs a unit if its router's score is at least this")
    sinks: int = Field(ge=0, description="first tokens of the sequence that run everything")
    special: tuple[int, ...] = Field(description="ids of tokens that run everything, ascending")
    attention: tuple[int, ...] = Field(description="layers whose attention is routed, ascending")
    mlp: tuple[int, ...] = Field(description="layers whose MLP is routed, ascending")

    @property
    def units(self) -> tuple[tuple[int, Unit], ...]:
        """(layer, unit) of every routed unit, in the order they run."""
        return tuple(sorted([(i, UNITS[0]) for i in self.attention] + [(i, UNITS[1]) for i in self.mlp]))

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("attention", "mlp", "special"):
            found = getattr(self, name)
            if list(found) != sorted(set(found)):
                raise ValueError(f"{name} of the routing is not ascending")
        return self


class Vocabulary(Strict):
    """Merged tokens beside the model's own: prompts are read in fewer positions (docs/passes/dynamic-tokenization.md).

    Merged tokens are read. Unless ``write`` says otherwise, they are never written: what is generated are tokens of the
    base vocabulary.
    """

    mode: Literal["static", "dynamic"] = Field(
        description="static: the merges are frozen and stand in tokenizer.json; dynamic: found in each batch of "
        "prompts, by sparsec.load alone"
    )
    base: int = Field(ge=1, description="rows of the base model's embedding; ids from here on are merged tokens")
    merged: int = Field(ge=1, description="merged tokens; dynamic: of a batch, at most")
    rows: int = Field(ge=1, description="rows of the embedding; those behind the merged tokens only fill it up")
    width: int = Field(ge=1, description="dimensions of an embedding")
    boundary: Literal["pretoken", "word", "phrase"] = Field(description="what a merged token stays in")
    least: int | None = Field(default=None, ge=2, description="dynamic: a pair is merged that a batch has so often")
    prediction: Literal["mean", "hypernetwork"] | None = Field(
        default=None, description="dynamic: what gives embeddings, the mean of the pieces or the stored hypernetwork"
    )
    inputs: int | None = Field(default=None, ge=1, description="numbers that the hypernetwork reads of a piece")
    write: Literal["base", "merged"] = Field(
        default="base",
        description="what generate() writes; merged: by sparsec alone, others write base tokens",
    )

    @model_serializer(mode="wrap")
    def _without_null(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plans keep the digests that they had before there was mode dynamic, and before merged tokens were written."""
        data: dict[str, Any] = write(self)
        if self.write == "base":
            data.pop("write", None)
        return {key: value for key, value in data.items() if value is not None}

    @model_validator(mode="after")
    def _check(self) -> Self:
        dynamic = self.mode == "dynamic"
        if dynamic != (self.least is not None) or dynamic != (self.prediction is not None):
            raise ValueError("a dynamic vocabulary has least and prediction, a static one neither")
        if (self.prediction == "hypernetwork") != (self.inputs is not None):
            raise ValueError("a hypernetwork, and nothing else, has inputs")
        if dynamic and self.write == "merged":
            raise ValueError("tokens merged by the batch are not written")
        if self.rows < self.base + self.merged:
            raise ValueError(f"{self.rows} rows do not hold {self.base} tokens and {self.merged} merged ones")
        return self


class LayerPlan(Strict):
    """One decoder layer."""

    heads: tuple[Literal[0, 1], ...] | None = Field(
        description="per query head, 1 = retrieval, 0 = local; null: the layer runs as the model made it"
    )
    index: Literal["none", "full", "shared"] = Field(
        default="none",
        description="none: retrieval heads are dense in decode; full: the layer has an indexer; "
        "shared: it reads the index set of the nearest full layer below",
    )

    @property
    def retrieval(self) -> tuple[int, ...]:
        """Indices of the retrieval query heads, ascending."""
        return tuple(h for h, kind in enumerate(self.heads or ()) if kind)

    @property
    def local(self) -> tuple[int, ...]:
        """Indices of the local query heads, ascending."""
        return tuple(h for h, kind in enumerate(self.heads or ()) if not kind)

    def local_kv_heads(self, group: int) -> tuple[int, ...]:
        """KV heads that are evicted to sinks and window: those whose query heads are all local."""
        heads = self.heads or ()
        return tuple(k for k in range(len(heads) // group) if not any(heads[k * group : (k + 1) * group]))


class PassRecord(Strict):
    """A pass that had a hand in the plan, with its whole configuration."""

    name: str
    config: dict[str, Any] = Field(default_factory=dict)


class Plan(Strict):
    """The compiler's IR. Immutable; passes make new ones with :meth:`edit`."""

    format: Literal[1] = 1
    producer: str = Field(description="name and version of the writer")
    model: ModelShape
    window: Window | None = Field(default=None, description="of all local heads")
    selector: Selector | None = Field(default=None, description="of all layers with an index that a pass fitted")
    dsa: Dsa | None = Field(default=None, description="of all layers with an index, where the indexers are the model's")
    min_context: int = Field(
        default=0, ge=0, description="a query whose context, itself included, is at most this long is dense"
    )
    vocabulary: Vocabulary | None = Field(default=None, description="null, or absent: the base model's")
    layers: tuple[LayerPlan, ...]
    routing: Routing | None = Field(default=None, description="null, or absent: every token runs every unit")
    passes: tuple[PassRecord, ...] = ()

    @model_serializer(mode="wrap")
    def _without_null(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What a plan does not use is not in its JSON: plans keep their digests when fields are added."""
        data: dict[str, Any] = write(self)
        return {key: value for key, value in data.items() if value is not None or key not in ("vocabulary", "routing")}

    @classmethod
    def dense(cls, model: ModelShape, producer: str, native: tuple[int, ...] = ()) -> Plan:
        """The plan of the unchanged model: every head retrieval, no index; ``native`` layers are left alone."""
        layers = [{"heads": None if i in native else (1,) * model.heads} for i in range(model.layers)]
        return cls.parse({"producer": producer, "model": model, "layers": layers})

    @classmethod
    def indexing(cls, model: ModelShape, producer: str, dsa: Dsa, index: tuple[str, ...]) -> Plan:
        """The plan of an unchanged model with indexers of its own; ``index``: full or shared, by layer."""
        layers = [{"heads": (1,) * model.heads, "index": kind} for kind in index]
        return cls.parse({"producer": producer, "model": model, "layers": layers, "dsa": dsa.model_dump()})

    @classmethod
    def parse(cls, data: object) -> Plan:
        """Read a plan from JSON data.

        Raises:
            PlanError: the data is no plan; the message names the first field that is wrong.
        """
        if isinstance(data, dict) and data.get("format", FORMAT) != FORMAT:
            found = repr(data["format"])[:40]
            raise PlanError(f"the plan has format {found}, this sparsec reads {FORMAT}: update sparsec")
        _check_bounds(data)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise PlanError(f"not a valid plan: {first_error(error)}") from None

    def edit(self, **changes: Any) -> Plan:
        """A copy with fields replaced, validated again.

        Raises:
            PlanError: the new plan contradicts itself.
        """
        return Plan.parse({**self.model_dump(), **changes})

    @property
    def frozen(self) -> Vocabulary | None:
        """Its merged tokens, where they stand in the tokenizer and the embedding: not those found by the batch."""
        own = self.vocabulary
        return own if own is not None and own.mode == "static" else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; :meth:`parse` gives an equal plan back."""
        return self.model_dump(mode="json", exclude=self._unsaid)

    @property
    def _unsaid(self) -> set[str]:
        """Fields that came later and say nothing here: plans without them stay what they were, byte by byte."""
        return {"vocabulary"} if self.vocabulary is None else set()

    @property
    def digest(self) -> str:
        """sha256 of what runs: everything but the producer and the passes' records."""
        data = self.model_dump(mode="json", exclude={"producer", "passes"} | self._unsaid)
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    @property
    def is_dense(self) -> bool:
        """No head is local, no layer has an index and no token is routed."""
        return self.routing is None and all(not layer.local and layer.index == "none" for layer in self.layers)

    @property
    def span(self) -> int | None:
        """Tokens up to which nothing is left out: the window, or what a model's own indexers choose."""
        if self.window is not None:
            return self.window.size
        return self.dsa.top_k if self.dsa is not None else None

    @property
    def selects_in_prefill(self) -> bool:
        """Prompt rows choose keys as well: by blocks, or with the model's own indexers."""
        return self.dsa is not None or (self.selector is not None and self.selector.prefill == "selector")

    def indexed(self) -> tuple[int, ...]:
        """Layers with an index, full or shared, ascending."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.index != "none")

    def index_source(self, layer: int) -> int:
        """The full layer whose index set ``layer`` uses: itself, or the nearest full one below."""
        return max(i for i in range(layer + 1) if self.layers[i].index == "full")

    @property
    def pattern(self) -> str:
        """Index sharing as a string: a letter a layer with an index, F(ull) or S(hared)."""
        return "".join(self.layers[i].index[0].upper() for i in self.indexed())

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.layers) != self.model.layers:
            raise ValueError(f"{len(self.layers)} layers are planned, the model has {self.model.layers}")
        if self.dsa is not None and (self.selector is not None or any(layer.local for layer in self.layers)):
            raise ValueError("a model with indexers of its own takes no others, and no local heads")
        full_below = False
        for i, layer in enumerate(self.layers):
            if layer.heads is not None and len(layer.heads) != self.model.heads:
                raise ValueError(f"layer {i} plans {len(layer.heads)} heads, the model has {self.model.heads}")
            if layer.local and self.window is None:
                raise ValueError(f"layer {i} has local heads, but the plan has no window")
            if layer.index == "none":
                continue
            if not layer.retrieval:
                raise ValueError(f"layer {i} has an index, but no retrieval head")
            if self.selector is None and self.dsa is None:
                raise ValueError(f"layer {i} has an index, but the plan has no selector")
            if layer.index == "shared":
                if not full_below:
                    raise ValueError(f"layer {i} shares an index, but no layer below it has one of its own")
                if self.selector is not None and self.selector.scope != "layer":
                    raise ValueError("shared layers need the selector's scope to be 'layer'")
            full_below |= layer.index == "full"
        if self.routing is not None:
            self._check_routing(self.routing)
        return self

    def _check_routing(self, routing: Routing) -> None:
        if self.dsa is not None:
            raise ValueError("units of a model with indexers of its own cannot be routed")
        if (
            max((*routing.attention, *routing.mlp), default=0) >= self.model.layers
            or min(routing.units or ((0, ""),))[0] < 0
        ):
            raise ValueError(f"a layer is routed that the model does not have: it has {self.model.layers}")
        fixed = set(self.attention_fixed())
        for i in routing.attention:
            if i in fixed:
                raise ValueError(f"the attention of layer {i} is routed: {self.attention_fixed()[i]}")

    def attention_fixed(self) -> dict[int, str]:
        """Layers whose attention every token must run, with the reason."""
        reasons: dict[int, str] = {}
        shared = {self.index_source(i) for i, layer in enumerate(self.layers) if layer.index == "shared"}
        for i, layer in enumerate(self.layers):
            if layer.heads is None:
                reasons[i] = "the model runs it with a sliding window of its own"
            elif i in shared:
                reasons[i] = "layers above read its index set"
            elif layer.local and self.window is not None and self.window.compensate:
                reasons[i] = "its window compensates for what it drops"
            elif layer.index != "none" and self.selector is not None and self.selector.prefill == "selector":
                reasons[i] = "its prompt rows choose keys together"
        return reasons


def _check_bounds(data: object, depth: int = 0, recorded: bool = False) -> None:
    """A plan asks for no number that tokens cannot have, and nests no deeper than any of ours: it may be anybody's.

    recorded: inside of ``passes``, which nothing runs.
    """
    if depth > DEEPEST:
        raise PlanError(f"not a valid plan: it is nested more than {DEEPEST} deep")
    if isinstance(data, int) and not recorded and abs(data) > LARGEST:
        raise PlanError(f"not a valid plan: it asks for a number of {data.bit_length()} bits, {LARGEST} is the most")
    if isinstance(data, dict):
        for key, value in data.items():
            _check_bounds(value, depth + 1, recorded or (depth == 0 and key == "passes"))
    elif isinstance(data, list | tuple):
        for value in data:
            _check_bounds(value, depth + 1, recorded)


def first_error(error: ValidationError) -> str:
    """One line for pydantic's first complaint: where and what."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part)[:80] for part in first["loc"])
    what = first["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what
