"""Turn Dynamo's graph of a policy into one like `capture`'s: ATen operators, the checkpoint's names, weights inside."""

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.traceback import preserve_node_meta

from evla_compile.errors import PassError, UnsupportedModelError
from evla_compile.families.cogact.capture import mark_stages
from evla_compile.families.cogact.loading.sizes_from_shapes import infer_sizes
from evla_compile.graph.capture import clean
from evla_compile.graph.contract import copy_graph, propagate, remove_dead_nodes, weights
from evla_compile.graph.policy_call import ADVICE, PolicyCall, find_policy_call
from evla_compile.graph.sites import argument, is_call, module_path, nodes_under
from evla_compile.settings.anatomy import COGACT, DENOISED, INPUT_IDS
from evla_compile.settings.sizes import ModelSizes

aten = torch.ops.aten

_ROOTS = rf"(?:{'|'.join(COGACT.roots)})(?:\.|$)"
"""Pattern of the first module of paths within a policy."""


class Number(NamedTuple):
    """A number among Dynamo's inputs that is a constant in the captured graph."""

    name: str
    """Dynamo's name for it."""
    position: int
    """Position among the inputs that Dynamo passes."""
    value: float
    """Its value when the graph was captured."""


class DynamoGraph(NamedTuple):
    """A policy as Dynamo captured it."""

    graph: fx.GraphModule
    """The whole sampler, unrolled, with the inputs of a finished graph: the values that reach the policy."""
    weights: dict[str, int]
    """Positions of the weights among the inputs that Dynamo passes, by their names in the state dict."""
    numbers: tuple[Number, ...]
    """Numbers that are constants in the graph."""


def read_graph(gm: fx.GraphModule, inputs: Sequence[Any]) -> DynamoGraph:
    """Return the policy in Dynamo's graph in the form of `capture`.

    The operators that compute the policy's inputs, or use its samples, are left out; see `replace_policy_call`.

    Args:
        gm: Dynamo's graph of torch calls, with the weights among its inputs.
        inputs: the inputs that it was captured with.

    Raises:
        PassError: the text length was captured as a constant.
        UnsupportedModelError: it has no whole call of a `CogACT`, or one that cannot be compiled.
    """
    call = find_policy_call(gm.graph)
    entering = [node.meta["example_value"] for node in call.inputs]
    _check_inputs(entering)
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    needed = set(call.computed)
    positions = {node: position for position, node in enumerate(placeholders) if node in needed}
    numbers = {n: _number(inputs[position]) for n, position in positions.items() if _is_number(n, inputs[position])}
    names = {node: _name(node) for node in positions if node not in numbers}
    other = sorted(str(node.target) for node, name in names.items() if "." not in name)
    if other:
        raise UnsupportedModelError(
            f"backend evla was handed a graph whose policy reads {', '.join(other)} beside"
            f" {', '.join(COGACT.input_names)} and its weights: {ADVICE}"
        )
    core = _core(gm, call, numbers, names)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [_fake(mode, name, value) for name, value in zip(COGACT.input_names, entering, strict=True)]
    fakes += [mode.from_tensor(inputs[positions[node]].detach(), static_shapes=True) for node in names]

    def interpreted(*values: Any) -> Any:
        with preserve_node_meta():
            return fx.Interpreter(core).run(*values)

    with torch.no_grad(), mode:
        traced = make_fx(interpreted, pre_dispatch=True)(*fakes)
    remove_dead_nodes(traced.graph)  # of a step counter, for instance
    captured = _captured(traced, {names[node]: inputs[positions[node]] for node in names})
    used = {name for name, _ in weights(captured)}
    return DynamoGraph(
        graph=captured,
        weights={name: positions[node] for node, name in names.items() if name in used},
        numbers=tuple(Number(_name(node), positions[node], number) for node, number in numbers.items()),
    )


def _check_inputs(entering: Sequence[Any]) -> None:
    """Refuse inputs of other dtypes or ranks than a compiled policy takes, and a constant text length."""
    for form, value in zip(COGACT.inputs, entering, strict=True):
        dtype, ndim = getattr(torch, form.dtype), len(form.axes)
        if not isinstance(value, Tensor) or value.dtype != dtype or value.ndim != ndim:
            found = f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UnsupportedModelError(
                f"{form.name} reaches the policy as {found}: expected a tensor of {dtype} with {ndim} dimensions"
            )
    if isinstance(entering[1].shape[1], int):
        raise PassError(
            "the text length was captured as a constant: call the policy itself, whose forward keeps it symbolic, or"
            " mark it before the first call: torch._dynamo.mark_dynamic(input_ids, 1)"
        )


def _is_number(node: fx.Node, given: Any) -> bool:
    """Tell whether one of Dynamo's inputs is a number: a size, or a float that it passes as a tensor to be read."""
    if not isinstance(given, Tensor):
        return True
    return given.ndim == 0 and all(user.op == "call_method" and user.target == "item" for user in node.users)


def _number(given: Any) -> float:
    if isinstance(given, Tensor):
        return float(given.item())
    return given if isinstance(given, int | float) else given.node.hint  # of a SymInt; comparing it would add a guard


def _core(
    gm: fx.GraphModule, call: PolicyCall, numbers: Mapping[fx.Node, float], names: Mapping[fx.Node, str]
) -> fx.GraphModule:
    """Return the policy's own part of Dynamo's graph: the four inputs, then the weights `names` -> the samples.

    Numbers become constants, except the text length, which is the size of the input ids.
    """
    graph, values = fx.Graph(), dict[fx.Node, Any]()
    given = [graph.placeholder(name) for name in COGACT.input_names]
    values |= {getter: given[getter.args[1]] for getter in call.enter.users if isinstance(getter.args[1], int)}
    values |= {node: graph.placeholder(f"weight_{count}") for count, node in enumerate(names)}
    text = call.inputs[1].meta["example_value"].shape[1]
    length = graph.call_method("size", (given[1], 1))
    for node, number in numbers.items():
        offset = _offset(node.meta["example_value"], text)
        read = number if offset is None else graph.call_function(operator.add, (length, offset))
        values[node] = read
        values |= dict.fromkeys((user for user in node.users if user.target == "item"), read)
    for node in call.computed:
        if node not in values:
            values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(values[argument(call.leave, 0)])
    return fx.GraphModule(gm, graph)


def _offset(size: Any, text: torch.SymInt) -> int | None:
    """Return how much larger `size` is than the text length; None for a size of something else.

    Raises:
        UnsupportedModelError: it is neither the text length plus a number nor free of it.
    """
    if not isinstance(size, torch.SymInt) or not size.node.expr.free_symbols & text.node.expr.free_symbols:
        return None
    difference = size.node.expr - text.node.expr
    if not difference.is_Integer:
        raise UnsupportedModelError(
            f"the input ids that reach the policy are {text} tokens long, in terms of the length {size} of an argument:"
            f" expected this length plus or minus a number; {ADVICE}"
        )
    return int(difference)


def _fake(mode: FakeTensorMode, name: str, value: Tensor) -> Tensor:
    """Return a fake tensor with the dtype and shape of `value` in its first call, static except the text length."""
    shape = [size if isinstance(size, int) else size.node.hint for size in value.shape]
    sizes = [DimDynamic.STATIC] * len(shape)
    if name == INPUT_IDS:
        sizes[1] = DimDynamic.DYNAMIC
    return mode.from_tensor(
        torch.empty(shape, dtype=value.dtype, device=value.device),
        source=ConstantSource(name),
        symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes),
    )


def _captured(traced: fx.GraphModule, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """Return the traced graph, whose inputs end with the weights, with these as tensors and cleaned as `capture`'s."""
    root, graph = torch.nn.Module(), fx.Graph()
    values: dict[fx.Node, Any] = {}
    given = list(traced.graph.find_nodes(op="placeholder"))
    for name, node in zip((*COGACT.input_names, *tensors), given, strict=True):
        if name in COGACT.input_names:
            values[node] = graph.placeholder(name)
        else:
            _register(root, name, tensors[name].detach())
            values[node] = graph.get_attr(name)
        values[node].meta = {"val": node.meta["val"]}
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            _register(root, str(node.target), getattr(traced, str(node.target)))
        if node.op not in ("placeholder", "output"):
            values[node] = graph.node_copy(node, values.__getitem__)
            values[node].meta["nn_module_stack"] = _stack(node)
    graph.output(values[argument(traced.graph.output_node(), 0)])
    captured = fx.GraphModule(root, graph)
    clean(captured)
    mark_stages(captured)
    _name_steps(captured.graph)
    propagate(captured)
    return copy_graph(captured)


def _register(root: torch.nn.Module, name: str, tensor: Tensor) -> None:
    *path, leaf = name.split(".")
    module = root
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = module.get_submodule(part)
    module.register_buffer(leaf, tensor)


def _name(node: fx.Node) -> str:
    """Return the name of one of Dynamo's inputs: of a parameter in the policy's state dict, or an argument's own.

    Dynamo joins the path of a parameter, L['self']._modules['projector']._parameters['bias'], into a single word.
    """
    word = re.sub(r"^[lL]_", "", str(node.target)).removesuffix("_")
    _, *modules = word.split("_modules_")
    if not modules:
        return word
    last, _, leaf = modules.pop().rpartition("_parameters_")
    return _below_policy(".".join([*modules, last, leaf]))


def _below_policy(path: str) -> str:
    """Return the part of a path that is within the policy; "" for a path outside of it."""
    found = re.search(rf"(?:^|\.){_ROOTS}", path)
    return path[found.start() :].removeprefix(".") if found else ""


def _stack(node: fx.Node) -> dict[str, tuple[str, Any]]:
    """Return a node's module stack with paths relative to the policy: "L['self'].projector" -> "projector"."""
    stack = node.meta.get("nn_module_stack") or {}
    return {key: (_below_policy(path), kind) for key, (path, kind) in stack.items()}


def _name_steps(graph: fx.Graph) -> None:
    """Move the action model's calls, and the sampler's arithmetic behind each, under the paths of denoising steps."""
    step, inside = -1, False
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        path = module_path(node)
        entered = path.split(".", maxsplit=1)[0] == COGACT.action_model
        step += entered and not inside
        inside = entered
        if step >= 0:
            moved = f"{COGACT.denoising}.{step}" + (f".{path}" if path else "")
            node.meta["nn_module_stack"] = {moved: (moved, moved)}
            if is_call(node, aten.add.Tensor) and not path:
                node.meta["stage"] = f"{DENOISED}.{step}"


def find_sizes(gm: fx.GraphModule) -> ModelSizes:
    """Read a policy's sizes off the shapes of its tensors and attention heads.

    Raises:
        CheckpointError: a tensor that shows a size is missing.
        UnsupportedModelError: a part has no attention.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights(gm)}
    parts = {
        "dino": f"{COGACT.vision}.dino_featurizer.blocks.0",
        "siglip": f"{COGACT.vision}.siglip_featurizer.blocks.0",
        "llm": f"{COGACT.decoder_layers}.0",
        "dit": f"{COGACT.denoising}.0.{COGACT.action_model}.net.blocks.0",
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
        prefix = f"{COGACT.vision}.{tower}_featurizer."
        blocks = {name.split(".")[3] for name in shapes if name.startswith(f"{prefix}blocks.")}
        shapes |= {f"{prefix}norm.weight": (), f"{prefix}blocks.{len(blocks)}.norm1.weight": ()}
    return infer_sizes(shapes, heads)
