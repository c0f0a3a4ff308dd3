from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovsprune.core.errors import CheckpointError
from ovsprune.core.records import Costs, Preprocess
from ovsprune.slim.config import dump, parse
from ovsprune.slim.spec import (
    ACTIVATIONS,
    FORMAT_VERSION,
    KINDS,
    BaseSpec,
    FileSpec,
    LayerSpec,
    SliceSpec,
    SlimSpec,
    schema,
)

SPEC = SlimSpec(
    base=BaseSpec("ViT-B-16", "openai", True, {"proj": "a" * 64}, {"proj": "b" * 64}),
    family="open_clip-vit",
    library="open_clip_torch",
    library_version="3.3.0",
    architecture={"vision_cfg": {"width": 768}},
    activation="quick_gelu",
    preprocess=Preprocess((224, 224)),
    layers=(
        LayerSpec("blocks.0.attn", "heads", "blocks.0", 12, 6, 64),
        LayerSpec(
            "blocks.0.mlp", "mlp", "blocks.0", 3072, 1500, 1,
            (SliceSpec("blocks.0.mlp.c_fc", "out"), SliceSpec("blocks.0.mlp.c_proj", "in", 3)),
        ),
    ),
    protected=("*.11.attn",),
    dense=Costs(100, 10),
    slim=Costs(50, 6),
    files={
        "model.safetensors": FileSpec("c" * 64, 5),
        "mask.safetensors": FileSpec("d" * 64, 6),
    },
    provenance={"command": "ovsprune prune", "seed": 0, "nested": [1.5, None, {"a": True}]},
)  # fmt: skip

Change = Callable[[dict[str, Any]], object]


def changed(change: Change) -> str:
    document = json.loads(dump(SPEC))
    change(document)
    return json.dumps(document)


def test_round_trip() -> None:
    assert parse(dump(SPEC)) == SPEC
    assert parse(dump(SPEC).encode()) == SPEC
    assert dump(SPEC) == dump(dataclasses.replace(SPEC))


def test_heads_may_have_slices() -> None:
    whole = SPEC.layer("blocks.0.attn")
    parts = tuple(SliceSpec(f"{whole.name}.{x}_proj", "out") for x in "qkv")
    sliced = dataclasses.replace(whole, slices=(*parts, SliceSpec(f"{whole.name}.o_proj", "in")))
    assert (
        whole.is_whole_attention,
        sliced.is_whole_attention,
        SPEC.layer("blocks.0.mlp").is_whole_attention,
    ) == (True, False, False)
    spec = dataclasses.replace(SPEC, layers=(sliced, *SPEC.layers[1:]))
    assert parse(dump(spec)) == spec
    jsonschema.validate(json.loads(dump(spec)), schema())


def test_layers_without_units_are_valid() -> None:
    layers = tuple(dataclasses.replace(layer, kept=0) for layer in SPEC.layers)
    spec = dataclasses.replace(SPEC, layers=layers)
    assert parse(dump(spec)) == spec
    jsonschema.validate(json.loads(dump(spec)), schema())


def test_ratio_and_layer() -> None:
    assert SPEC.ratio == 0.5
    assert SPEC.layer("blocks.0.mlp").kept == 1500
    with pytest.raises(KeyError, match="nowhere"):
        SPEC.layer("nowhere")


def test_schema_has_the_fields_of_the_spec() -> None:
    found = schema()
    jsonschema.Draft202012Validator.check_schema(found)
    jsonschema.validate(json.loads(dump(SPEC)), found)
    assert set(found["properties"]) == {
        "format", "format_version", *(f.name for f in dataclasses.fields(SlimSpec))
    }  # fmt: skip
    assert set(found["properties"]["base"]["properties"]) == {
        f.name for f in dataclasses.fields(BaseSpec)
    }
    assert set(found["$defs"]["layer"]["properties"]) == {
        f.name for f in dataclasses.fields(LayerSpec)
    }
    assert found["properties"]["activation"]["enum"] == list(ACTIVATIONS)
    assert found["$defs"]["layer"]["properties"]["kind"]["enum"] == list(KINDS)
    assert found["properties"]["format_version"]["const"] == FORMAT_VERSION


BAD: dict[str, tuple[Change, str]] = {
    "another format": (lambda d: d.update(format="safetensors"), "not the config of a slim"),
    "no format": (lambda d: d.pop("format"), "not the config of a slim"),
    "version 2": (lambda d: d.update(format_version=2), "format_version is 2, this ovsprune reads"),
    "version 3": (
        lambda d: d.update(format_version=3, interface=["transformer.stream"]),
        "format_version is 3, this ovsprune reads 1 only; prune the base model again",
    ),
    "interface": (lambda d: d.update(interface=[]), "unknown field 'interface'"),
    "head directions": (lambda d: d["layers"][0].update(kind="qk"), "kind is 'qk'"),
    "residual stream": (lambda d: d["layers"][1].update(kind="width"), "kind is 'width'"),
    "version as text": (lambda d: d.update(format_version="1"), "format_version is '1', expected"),
    "missing field": (lambda d: d.pop("layers"), "lacks 'layers'"),
    "unknown field": (lambda d: d.update(auto_map={"m": "x.Y"}), "unknown field 'auto_map'"),
    "unknown field below": (lambda d: d["layers"][0].update(cls="os.system"), "field 'cls'"),
    "code as library": (lambda d: d.update(library="os; import x"), "library is 'os; import x'"),
    "path as family": (lambda d: d.update(family="../evil"), "family is '../evil'"),
    "path as layer": (lambda d: d["layers"][0].update(name="../../etc"), r"layers\[0\].name is"),
    "path as slice": (lambda d: d["layers"][1]["slices"][0].update(module="/a"), "module is '/a'"),
    "path as file": (
        lambda d: d["files"].update({"../x": d["files"]["mask.safetensors"]}),
        "a file name is '../x'",
    ),
    "hidden file": (
        lambda d: d["files"].update({".ssh": d["files"]["mask.safetensors"]}),
        "a file name is '.ssh'",
    ),
    "negative size": (lambda d: d["files"]["mask.safetensors"].update(bytes=-1), "bytes is -1"),
    "short digest": (lambda d: d["base"]["tensors"].update(proj="ab"), "base.tensors.proj is 'ab'"),
    "path as tensor": (lambda d: d["base"]["tensors"].update({"a/b": "a" * 64}), "'a/b'"),
    "kept too many": (lambda d: d["layers"][0].update(kept=13), r"kept is 13, expected at most"),
    "negative number": (lambda d: d["layers"][0].update(kept=-1), r"layers\[0\].kept is -1"),
    "boolean as number": (lambda d: d["layers"][0].update(units=True), "units is True"),
    "huge number": (lambda d: d["layers"][0].update(units=2**70), "units is 1180591"),
    "fraction": (lambda d: d["dense"].update(macs=1.5), "dense.macs is 1.5"),
    "no slices": (
        lambda d: d["layers"][1].update(slices=[]),
        r"slices is \[\], expected at least one",
    ),
    "unknown kind": (lambda d: d["layers"][0].update(kind="neurons"), "kind is 'neurons'"),
    "unknown axis": (lambda d: d["layers"][1]["slices"][0].update(axis=0), "axis is 0"),
    "unknown activation": (lambda d: d.update(activation="swish"), "activation is 'swish'"),
    "trained as text": (lambda d: d["base"].update(trained="yes"), "base.trained is 'yes'"),
    "one side": (lambda d: d["preprocess"].update(size=[224]), "preprocess.size is"),
    "text as mean": (lambda d: d["preprocess"].update(mean=["a", 1, 1]), r"mean\[0\] is 'a'"),
    "list as architecture": (lambda d: d.update(architecture=[]), r"architecture is \[\]"),
    "control characters": (lambda d: d["base"].update(model="a\x1b[2J"), "printable"),
    "layers as object": (lambda d: d.update(layers={}), "layers is {}, expected an array"),
    "long text": (lambda d: d["base"].update(model="x" * 5000), "at most 4096"),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_documents_are_refused_by_parser_and_schema(name: str) -> None:
    change, message = BAD[name]
    document = changed(change)
    with pytest.raises(CheckpointError, match=message) as caught:
        parse(document, "here/config.json")
    assert str(caught.value).startswith("here/config.json")
    if name not in ("control characters", "kept too many"):  # a JSON schema cannot say these
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(json.loads(document), schema())


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"", "is not the JSON of a slim checkpoint"),
        (b"\xff\xfe{}", "is not the JSON of a slim checkpoint"),
        ("[" * 100_000, "nested too deeply|recursion"),
        ("[]", "not the config of a slim"),
        ('{"format": 1, "format": 2}', "'format' occurs twice"),
        ('{"format": NaN}', "NaN is no JSON number"),
        ("9" * 5000, "is not the JSON|not the config of a slim"),
    ],
)
def test_invalid_json_is_refused(document: str | bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse(document)


def test_repeated_layer_is_refused() -> None:
    document = changed(lambda d: d["layers"].append(d["layers"][0]))
    with pytest.raises(CheckpointError, match=r"layers contains blocks\.0\.attn more than once"):
        parse(document)


def test_provenance_must_be_plain_json() -> None:
    with pytest.raises(CheckpointError, match=r"provenance.path is .*expected plain JSON data"):
        dump(dataclasses.replace(SPEC, provenance={"path": object()}))
    with pytest.raises(CheckpointError, match=r"provenance.loss is nan, expected a finite"):
        dump(dataclasses.replace(SPEC, provenance={"loss": float("nan")}))
    odd = dataclasses.replace(SPEC, provenance={"file": "broken \udcff name"})
    assert "broken" in parse(dump(odd).encode()).provenance["file"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), JSON)
def test_any_value_is_parsed_or_refused(data: Any, value: Any) -> None:
    document = json.loads(dump(SPEC))
    node: Any = document
    while True:
        key = data.draw(
            st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node)))
        )
        if not isinstance(node[key], (dict, list)) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = value
    try:
        spec = parse(json.dumps(document))
    except CheckpointError as error:
        assert str(error)
    else:
        assert parse(dump(spec)) == spec
