"""The shortcuts of a training step on the CPU change no bit of the logits, and gradients only by rounding."""

import pytest
import torch
from helpers import random_ids, tiny_model

from llmkit.model.modeling_llmkit import LlmkitRMSNorm


@pytest.mark.parametrize("shape", [(12, 128), (3, 5, 128), (2, 7, 4, 6)], ids=str)
@pytest.mark.parametrize("is_frozen", [False, True])
def test_fused_backward_of_the_norm_has_the_gradient_of_the_formula(shape, is_frozen):
    torch.manual_seed(0)
    norm, x, grad = LlmkitRMSNorm(shape[-1], 1e-6), torch.randn(shape, requires_grad=True), torch.randn(shape)
    norm.weight.data.add_(torch.randn(shape[-1]) * 0.3)
    norm.weight.requires_grad_(not is_frozen)
    inputs = [p for p in (x, norm.weight) if p.requires_grad]
    fused, plain = norm.train()(x), norm.eval()(x)
    assert torch.equal(fused, plain) and "Fused" in fused.grad_fn.name() and "Fused" not in plain.grad_fn.name()
    results = [torch.autograd.grad(y, inputs, grad) for y in (fused, plain)]
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, dict(num_key_value_heads=2), dict(qk_norm=False)], ids=str)
def test_training_and_evaluation_give_the_same_logits_and_gradients(options):
    model, ids, results = tiny_model(**options), random_ids(2, 12), []
    for is_training in (True, False):
        model.train(is_training).zero_grad()
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
        results.append((out.logits, [p.grad for p in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-4)


def test_mask_is_left_out_when_nothing_but_the_causal_order_is_masked():
    """Under a compiler too, where positions cannot be looked at: attention then takes its fast causal path."""
    model, ids, masks = tiny_model().train(), random_ids(2, 12), []
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for forward in (model, compiled):
        forward(ids, use_cache=False)
    assert masks[0] is None
    attends = [n for g in graphs for n in g.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert len(attends) == 2 and all(n.kwargs["attn_mask"] is None and n.kwargs["is_causal"] for n in attends)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_take_the_formula_in_training_too(dtype):
    norm, x = LlmkitRMSNorm(64, 1e-6).to(dtype), torch.randn(8, 64).to(dtype).requires_grad_()
    trained, plain = norm.train()(x), norm.eval()(x)
    assert torch.equal(trained, plain) and "Fused" not in trained.grad_fn.name()


def test_a_compiler_sees_the_formula_of_the_norm():
    model, graphs = tiny_model().train(), []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    compiled(random_ids(2, 12), use_cache=False)
    targets = " ".join(str(node.target) for graph in graphs for node in graph.graph.nodes)
    assert "rsqrt" in targets and "autograd_function" not in targets and "rsqrt_" not in targets
