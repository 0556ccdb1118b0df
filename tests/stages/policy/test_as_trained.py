"""What is published is what was trained: tied weights once, in the recipe's precision, and as far from a policy in 4
bits as is said."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages.policy.as_trained import LONGEST, SAMPLE, divergence, refuse_other_precision, without_copies
from tests.models import make_model, make_tokenizer

TOKENIZER = make_tokenizer()


def tied_model():
    model = make_model(TOKENIZER)
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = True
    torch.manual_seed(1)
    return type(model)(config)


def gathered(model):
    """As `get_model_state_dict` of a sharded policy gives it: every tensor has its own storage."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_tied_weights_of_a_gathered_policy_are_published_once(tmp_path):
    """As from a policy that was never sharded; before, 0.5B parameters took 272 MB more."""
    model = tied_model()
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "gathered", state_dict=without_copies(model, gathered(model)))
    plain, found = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "gathered"))
    assert plain.keys() == found.keys() and "lm_head.weight" not in found
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "gathered")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_weights_that_are_not_tied_are_all_published():
    model = make_model(TOKENIZER)
    assert without_copies(model, gathered(model)).keys() == model.state_dict().keys()


def test_tied_weights_that_were_trained_apart_are_not_published():
    model = tied_model()
    state = gathered(model)
    state["lm_head.weight"][0, 0] += 1
    with pytest.raises(RuntimeError, match=r"lm_head.weight and model.embed_tokens.weight are tied"):
        without_copies(model, state)


@pytest.mark.parametrize(("held", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_policy_in_another_precision_is_not_published(held, asked, tmp_path):
    """FSDP2 in mixed precision gathers float32 masters of a bfloat16 policy."""
    model = make_model(TOKENIZER).to(getattr(torch, held))
    model.save_pretrained(tmp_path)
    refuse_other_precision(tmp_path, model, held)
    with pytest.raises(RuntimeError, match=rf"would be published in .* expected {asked}\)"):
        refuse_other_precision(tmp_path, model, asked)


def test_one_tensor_in_another_precision_is_named_unless_its_class_keeps_it(tmp_path):
    model = make_model(TOKENIZER).to(torch.bfloat16)
    state = {**gathered(model), "model.norm.weight": model.model.norm.weight.detach().float()}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(RuntimeError, match=r"^model.norm.weight would be published in F32"):
        refuse_other_precision(tmp_path, model, "bfloat16")
    model._keep_in_fp32_modules_strict = {"model.norm"}
    refuse_other_precision(tmp_path, model, "bfloat16")


def test_the_divergence_is_that_of_the_definition():
    """Token by token in float64, on the first rows, cut."""
    ours, theirs = make_model(TOKENIZER).train(), make_model(TOKENIZER, seed=1)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in (5, LONGEST + 40, 1, 17, 30)]
    terms = []
    for row in rows[:SAMPLE]:
        ids = torch.tensor([row[:LONGEST]])
        with torch.no_grad():
            p, q = (model.eval()(input_ids=ids).logits[0].double().softmax(-1) for model in (ours, theirs))
        terms += [float(sum(a * (a / b).log() for a, b in zip(p[t], q[t], strict=True))) for t in range(len(p))]
    ours.train()
    assert divergence(ours, theirs, rows) == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    assert ours.training and divergence(ours, ours, rows) == pytest.approx(0, abs=1e-6)
