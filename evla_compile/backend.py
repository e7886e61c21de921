"""`torch.compile(policy, backend="evla")`: the pipeline's passes on the graph that Dynamo captured.

Dynamo hands over a graph of torch calls with the parameters as inputs. It is traced to ATen operators, its parameters
become constants under their names in the checkpoint, and from there on it is a graph like that of `capture`, its
sampler unrolled already.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from evla_compile.capture import clean, mark_stages
from evla_compile.config import CompileConfig
from evla_compile.errors import PassError, UnsupportedModelError
from evla_compile.graph import copy_graph, fake_mode, materialize, propagate, weights
from evla_compile.model.policy import ModelSizes
from evla_compile.passes import UnrollDiffusion
from evla_compile.pipeline import build_passes, check_budgets, check_plan
from evla_compile.plan import Plan, plan_without_calibration
from evla_compile.sites import (
    ACTION_MODEL,
    DECODER_LAYERS,
    DENOISING,
    INPUT_NAMES,
    argument,
    indexed_modules,
    input_node,
    is_call,
    module_path,
    nodes_under,
)
from evla_compile.sizes import infer_sizes

Mode: TypeAlias = Literal["inductor", "eager"]
"""What runs the rewritten graph."""

Compiled: TypeAlias = Callable[..., Sequence[Tensor]]
"""What Dynamo calls instead of its own graph, with all its inputs."""

aten = torch.ops.aten


def compile_fx(gm: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None) -> Compiled:
    """Compile the whole sampler of a `CogACT`, as Dynamo captured it; the backend `evla` of `torch.compile`.

    The weights are taken as they are at the first call: later changes to the policy's parameters do not reach it.

    Args:
        gm: Dynamo's graph of `CogACT.forward`, batch and text budget those of the first call.
        inputs: what it was captured with.
        options: `config`, a `CompileConfig`, by default `CompileConfig()`; `plan`, that of an earlier `calibrate`, for
            budgets that need one; `mode`, "inductor" (default) or "eager".

    Raises:
        CalibrationError: a budget needs a plan and none is given, or it does not fit.
        PassError: a rewrite does not find its site.
        UnsupportedModelError: the graph is not that of a `CogACT`, or not all of it.
        ValueError: an option is unknown, or the first call was not of the configuration's sizes.
    """
    config, plan, mode = _read_options(options or {})
    graph, order = _to_graph(gm, inputs)
    sizes = _find_sizes(graph)
    check_budgets(config, sizes)
    if plan is None:
        plan = plan_without_calibration(sizes.language, config)
    check_plan(plan, config, sizes)
    _check_call(graph, config)
    for rewrite in build_passes(config, plan, sizes):
        if not isinstance(rewrite, UnrollDiffusion):  # the loop was unrolled as it was captured
            graph, _ = rewrite(graph)
    materialize(graph)
    run: Callable[..., Any] = _inductor(graph) if mode == "inductor" else graph
    text = order[INPUT_NAMES.index("input_ids")]

    def call(*arguments: Any) -> Sequence[Tensor]:
        if arguments[text].shape[1] != config.text_tokens:
            raise ValueError(
                f"input_ids has {arguments[text].shape[1]} text tokens, and this policy was compiled for"
                f" text_tokens={config.text_tokens}: pad the prompt to that"
            )
        with torch.no_grad():
            result = run(*(arguments[position] for position in order))
        return (result,) if isinstance(result, Tensor) else tuple(result)

    return call


def _read_options(options: Mapping[str, Any]) -> tuple[CompileConfig, Plan | None, Mode]:
    unknown = sorted(set(options) - {"config", "plan", "mode"})
    if unknown:
        raise ValueError(f"options {unknown}: expected config, plan and mode")
    config, plan, mode = options.get("config") or CompileConfig(), options.get("plan"), options.get("mode", "inductor")
    if not isinstance(config, CompileConfig) or not isinstance(plan, Plan | None):
        raise ValueError(f"options config={config!r:.60}, plan={plan!r:.60}: expected a CompileConfig and a Plan")
    if mode not in get_args(Mode):
        raise ValueError(f"options mode={mode!r}: expected one of {', '.join(get_args(Mode))}")
    return config, plan, mode


def _to_graph(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """Return the graph in the form of `capture`, and the positions of its four inputs among Dynamo's."""
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    fakes = [node.meta["example_value"] for node in placeholders]

    def interpreted(*values: Any) -> Any:
        with preserve_node_meta():
            return fx.Interpreter(gm).run(*values)

    mode = next(value.fake_mode for value in fakes if isinstance(value, FakeTensor))
    with torch.no_grad(), mode:
        traced = make_fx(interpreted, pre_dispatch=True)(*fakes)
    names = [_name(node) for node in placeholders]
    missing = [name for name in INPUT_NAMES if name not in names]
    if missing:
        raise UnsupportedModelError(
            f"backend evla was handed a graph without the inputs {', '.join(missing)}: it compiles a CogACT policy as a"
            " whole, torch.compile(policy, backend='evla') or policy.compile(backend='evla')"
        )
    order = tuple(names.index(name) for name in INPUT_NAMES)
    return _captured(traced, names, inputs), order


def _captured(traced: fx.GraphModule, names: Sequence[str], inputs: Sequence[Any]) -> fx.GraphModule:
    """Return the traced graph with parameters as tensors and the four inputs in their order, cleaned as `capture`'s."""
    root, graph = torch.nn.Module(), fx.Graph()
    values: dict[fx.Node, Any] = {}
    given = dict(zip(names, traced.graph.find_nodes(op="placeholder"), strict=True))
    for name in INPUT_NAMES:
        values[given[name]] = graph.placeholder(name)
        values[given[name]].meta = {"val": given[name].meta["val"]}
    for name, node, tensor in zip(names, given.values(), inputs, strict=True):
        if name in INPUT_NAMES:
            continue
        if isinstance(tensor, Tensor):
            _hold(root, name, tensor.detach())
            values[node] = graph.get_attr(name)
        else:  # the symbolic text length, which Dynamo passes beside the tensors
            values[node] = graph.call_function(aten.sym_size.int, (values[given["input_ids"]], 1))
        values[node].meta = {"val": node.meta["val"]}
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            _hold(root, str(node.target), getattr(traced, str(node.target)))
        if node.op not in ("placeholder", "output") and node.target is not torch._C._set_grad_enabled:
            values[node] = graph.node_copy(node, values.__getitem__)
            values[node].meta["nn_module_stack"] = _stack(node)
    (result,) = traced.graph.output_node().all_input_nodes
    graph.output(values[result])
    captured = fx.GraphModule(root, graph)
    clean(captured)
    mark_stages(captured)
    _name_steps(captured.graph)
    propagate(captured)
    return copy_graph(captured)


def _hold(root: torch.nn.Module, name: str, tensor: Tensor) -> None:
    *path, leaf = name.split(".")
    module = root
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = module.get_submodule(part)
    module.register_buffer(leaf, tensor)


def _name(node: fx.Node) -> str:
    """Return the name of one of Dynamo's inputs: of a parameter in the state dict, of an argument in the call.

    Dynamo joins what leads to a parameter, L['self']._modules['projector']._parameters['bias'], to a single word.
    """
    word = re.sub(r"^[lL]_", "", str(node.target)).removesuffix("_")
    _, *modules = word.split("_modules_")
    if not modules:
        return word
    last, _, leaf = modules.pop().rpartition("_parameters_")
    return ".".join([*modules, last, leaf])


def _stack(node: fx.Node) -> dict[str, tuple[str, Any]]:
    """Return a node's module stack with paths as they are below the policy: "L['self'].projector" -> "projector"."""
    stack = node.meta.get("nn_module_stack") or {}
    return {key: (re.sub(r"^L\['\w+'\]\.?", "", path), kind) for key, (path, kind) in stack.items()}


def _name_steps(graph: fx.Graph) -> None:
    """Move the action model's calls, and the sampler's arithmetic behind each, under the paths of denoising steps."""
    step, inside = -1, False
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        path = module_path(node)
        entered = path.split(".", maxsplit=1)[0] == ACTION_MODEL
        step += entered and not inside
        inside = entered
        if step >= 0:
            moved = f"{DENOISING}.{step}" + (f".{path}" if path else "")
            node.meta["nn_module_stack"] = {moved: (moved, moved)}
            if is_call(node, aten.add.Tensor) and not path:
                node.meta["stage"] = f"{DENOISING}.{step}"


def _find_sizes(gm: fx.GraphModule) -> ModelSizes:
    """Read a policy's sizes off the shapes of its tensors and attention heads."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights(gm)}
    parts = {
        "dino": "vision_backbone.dino_featurizer.blocks.0",
        "siglip": "vision_backbone.siglip_featurizer.blocks.0",
        "llm": f"{DECODER_LAYERS}.0",
        "dit": f"{DENOISING}.0.{ACTION_MODEL}.net.blocks.0",
    }
    heads = {}
    for part, path in parts.items():
        attention = [n for n in nodes_under(gm.graph, path) if is_call(n, aten.scaled_dot_product_attention.default)]
        if len(attention) != 1:
            raise UnsupportedModelError(
                f"backend evla found no attention under {path!r}: it compiles a CogACT policy as a whole,"
                " policy.compile(backend='evla') or torch.compile(policy, backend='evla')"
            )
        heads[part] = int(argument(attention[0], 0).meta["val"].shape[1])
    for tower in ("dino", "siglip"):  # a checkpoint has the last block and norm too, which no policy reads
        prefix = f"vision_backbone.{tower}_featurizer."
        blocks = {name.split(".")[3] for name in shapes if name.startswith(f"{prefix}blocks.")}
        shapes |= {f"{prefix}norm.weight": (), f"{prefix}blocks.{len(blocks)}.norm1.weight": ()}
    return infer_sizes(shapes, heads)


def _check_call(gm: fx.GraphModule, config: CompileConfig) -> None:
    """Refuse a first call that was not of the configuration's sizes, and a text length that was not kept symbolic."""
    graph = gm.graph
    batch, text = input_node(graph, "input_ids").meta["val"].shape
    if isinstance(text, int):
        raise PassError(
            "the text length was captured as a constant: call the policy itself, whose forward keeps it symbolic, or"
            " mark it before the first call: torch._dynamo.mark_dynamic(input_ids, 1)"
        )
    steps = len(indexed_modules(graph, DENOISING))
    scales = [
        node.args[1]
        for node in graph.nodes
        if is_call(node, aten.mul.Tensor) and module_path(node) == f"{DENOISING}.0.{ACTION_MODEL}.net"
    ]
    found = {"batch_size": int(batch), "ddim_steps": steps, "cfg_scale": float(scales[0]) if scales else 1.0}
    wrong = [
        f"{name}={value}, not {getattr(config, name)}"
        for name, value in found.items()
        if value != getattr(config, name)
    ]
    if wrong:
        raise ValueError(
            f"the policy was called with {'; '.join(wrong)}: call it as the configuration says, or give the backend one"
            " that says what is called, options={'config': CompileConfig(...)}"
        )


def _inductor(gm: fx.GraphModule) -> Callable[..., Any]:
    """Compile a finished graph by Inductor."""
    with fake_mode(gm):
        inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        compiled: Callable[..., Any] = torch._inductor.compile(gm, inputs)
    return compiled
