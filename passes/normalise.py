"""One spelling per operator: from an exported program to the plain graph that passes work on.

Rebuilds the graph: wrappers inlined, asserts and no-ops dropped, in-place operators made
functional (``mutation``), parameters as ``get_attr`` nodes under their original names.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from galvatron_compile.errors import UnsupportedError
from galvatron_compile.graph import note
from galvatron_compile.passes.blame import where
from galvatron_compile.passes.mutation import Mutations, is_inplace
from galvatron_compile.torch_private import fake_mode_of, size_expression

aten = torch.ops.aten

_DROPPED = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten._assert_async.default,
        aten._assert_async.msg,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
        torch._check,
    }
)
_IDENTITIES = frozenset({aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.alias.default})
_DETACHES = frozenset({aten.detach.default, aten.detach_.default})
_CASTS = frozenset(
    {
        aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.to.other, aten.to.device,
        aten.type_as.default,
    }
)  # fmt: skip


class Normaliser:
    """Copies nodes of exported graphs into ``graph``, each in its one spelling.

    prefix: module path of the captured model inside the exported wrapper, cut from the metadata.
    differentiable: the new nodes through which gradients flow to a parameter.
    """

    def __init__(self, graph: fx.Graph, prefix: str) -> None:
        self.graph = graph
        self.prefix = prefix
        self.differentiable: set[fx.Node] = set()
        self.without_grad = False

    def run(
        self, module: fx.GraphModule, env: dict[fx.Node, Any], protected: Mapping[fx.Node, str]
    ) -> Any:
        """Copy ``module``'s graph and return the new output value.

        env: new value of each placeholder. protected: placeholders that the graph may not write
        to, with what they are; writing raises UnsupportedError.
        """
        mutations = Mutations(self.emit, module.graph, protected)
        for node in module.graph.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], lambda n: env[n])
            if node.op == "call_function":
                env[node] = self.copy(module, node, env, mutations)
            elif node.op != "placeholder" and node.op != "get_attr":
                raise UnsupportedError(f"{where(node)}: operation {node.op} is not supported")
        raise AssertionError("a graph without an output")

    def copy(
        self,
        module: fx.GraphModule,
        node: fx.Node,
        env: dict[fx.Node, Any],
        mutations: Mutations,
    ) -> Any:
        """The new value of ``node``: a new node, an old new one, or a tuple of them."""
        target = node.target
        if target in _DROPPED:
            return None
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self.inline(module, node, env)
        if target is operator.getitem:
            packed, position = node.args
            assert isinstance(packed, fx.Node)
            held = env[packed]
            if isinstance(held, (tuple, list)):
                assert isinstance(position, int)
                return held[position]
        if is_inplace(node) and target not in _DETACHES:
            return mutations.rewrite(node, env)
        mutations.follow(node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
        return self.spelled(node, args, dict(kwargs))

    def spelled(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = node.target
        source: Any = args[0] if args else None
        assert not isinstance(target, str)  # of a call_function
        if target in _IDENTITIES:
            return source
        if target in _DETACHES:
            return self.detach(source)
        if target in _CASTS and (cast := self.cast(node, source)) is not None:
            return cast
        if target is aten.slice.Tensor and same_shape(node.meta["val"], source):
            return source
        if target is aten.dropout.default and (args[1] == 0 or not args[2]):
            return source
        kwargs.pop("pin_memory", None)
        return self.emit(target, args, kwargs, node, node.meta["val"])

    def cast(self, node: fx.Node, source: fx.Node) -> fx.Node | None:
        """``to.dtype`` or nothing at all; None where the device changes, which stays as it is."""
        before, after = source.meta["val"], node.meta["val"]
        copies = node.kwargs.get("memory_format") not in (None, torch.preserve_format)
        if before.device != after.device or copies:
            return None
        if before.dtype == after.dtype:
            return source
        return self.emit(aten.to.dtype, (source, after.dtype), {}, node, after)

    def detach(self, source: Any) -> Any:
        if source not in self.differentiable:
            return source
        return self.emit(aten.detach.default, (source,), {}, source, source.meta["val"])

    def emit(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        origin: fx.Node,
        value: Any = None,
    ) -> fx.Node:
        """A new node; its value is computed from its inputs' values where none is given."""
        packet = getattr(target, "overloadpacket", target)
        new = self.graph.create_node(
            "call_function", target, args, dict(kwargs), name=getattr(packet, "__name__", None)
        )
        new.meta["val"] = value if value is not None else fake_result(new)
        if "stack_trace" in origin.meta:
            new.meta["stack_trace"] = origin.meta["stack_trace"]
        if stack := origin.meta.get("nn_module_stack"):
            new.meta["nn_module_stack"] = {
                key: (self.unprefixed(path), kind) for key, (path, kind) in stack.items()
            }
        self.track_gradient(new)
        return new

    def unprefixed(self, path: str) -> str:
        return "" if path == self.prefix else path.removeprefix(self.prefix + ".")

    def track_gradient(self, new: fx.Node) -> None:
        held = new.meta["val"]
        values = held if isinstance(held, (tuple, list)) else (held,)
        floating = any(
            isinstance(v, torch.Tensor) and (v.dtype.is_floating_point or v.dtype.is_complex)
            for v in values
        )
        if not floating:
            return
        if new.target not in _DETACHES and any(
            source in self.differentiable for source in new.all_input_nodes
        ):
            self.differentiable.add(new)
        else:
            note(new, differentiable=False)

    def inline(self, module: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """The values of a wrapped region, copied in place of the wrapper."""
        name = str(node.target)
        if "set_grad_enabled" in name:
            enabled, body, *inputs = node.args
            if enabled and self.without_grad:
                raise UnsupportedError(
                    f"{where(node)}: enable_grad inside no_grad is not supported; "
                    "compute the inner part outside of no_grad"
                )
            return self.region(module, body, inputs, env, without_grad=not enabled)
        if "autocast" in name:
            device, _, enabled, _, body, *inputs = node.args
            if enabled:
                raise UnsupportedError(
                    f"{where(node)}: autocast on {device} inside the model is not supported; "
                    "remove it and choose the precision when compiling"
                )
            return self.region(module, body, inputs, env, without_grad=False)
        raise UnsupportedError(
            f"{where(node)}: the operator {name} is not supported; write it with plain operators "
            "(for attention in transformers: attn_implementation='sdpa')"
        )

    def region(
        self,
        module: fx.GraphModule,
        body: Any,
        inputs: list[Any],
        env: dict[fx.Node, Any],
        *,
        without_grad: bool,
    ) -> Any:
        inner = module.get_submodule(str(body.target))
        assert isinstance(inner, fx.GraphModule)
        places = [n for n in inner.graph.nodes if n.op == "placeholder"]
        outer, self.without_grad = self.without_grad, self.without_grad or without_grad
        values = [env[i] if isinstance(i, fx.Node) else i for i in inputs]
        protected = {place: "a value from outside of a wrapped region" for place in places}
        result = self.run(inner, dict(zip(places, values, strict=True)), protected)
        self.without_grad = outer
        if without_grad:
            result = fx.node.map_arg(result, self.detach)
        return result


def fake_result(node: fx.Node) -> Any:
    """What ``node`` would return, as a fake tensor, from its inputs' fake tensors."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    tensors = [n.meta["val"] for n in node.all_input_nodes]
    fake = next(value for value in tensors if isinstance(value, torch.Tensor))
    with fake_mode_of(fake):
        return node.target(*args, **kwargs)  # type: ignore[operator]


def same_shape(value: torch.Tensor, source: fx.Node) -> bool:
    ours, theirs = value.shape, source.meta["val"].shape
    return len(ours) == len(theirs) and all(
        size_expression(a) == size_expression(b) for a, b in zip(ours, theirs, strict=True)
    )


def retarget_devices(module: fx.GraphModule, device: torch.device) -> None:
    """Make every factory (``arange``, ``zeros``, ``to`` a device) in ``module`` use ``device``."""
    for node in module.graph.nodes:
        if isinstance(node.kwargs.get("device"), torch.device):
            node.kwargs = {**node.kwargs, "device": device}
        if any(isinstance(arg, torch.device) for arg in node.args):
            node.args = tuple(device if isinstance(arg, torch.device) else arg for arg in node.args)
    module.recompile()
