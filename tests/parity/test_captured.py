"""What `LLM.generate` captures against hooks on the modules of transformers."""

import numpy as np
import pytest

from jllm import LLM, Edit, SamplingParams
from tests.parity.hooks import hooked
from tests.parity.oracle import SMALL, TOLERANCE, checkpoint, random_prompt

torch = pytest.importorskip("torch")

MODELS = {
    "llama": {"family": "llama"},
    "gemma2": {
        "family": "gemma2",
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 1.5,
        "sliding_window": 6,
        "tie_word_embeddings": True,
    },
}
CAPTURE = ("layers.*", "final")


def add(x, vector):
    return x + vector[None]


@pytest.mark.parametrize("name", MODELS)
def test_prompt_and_generated_tokens_in_chunks_and_beside_others(name):
    saved = checkpoint(**MODELS[name])
    prompts = [random_prompt(n, seed=n) for n in (75, 5, 21)]
    params = SamplingParams(
        temperature=0, max_tokens=12, ignore_eos=True, detokenize=False
    )
    options = {"skip_tokenizer_init": True, "compile_ahead": False, **SMALL}
    with LLM(str(saved.folder), **options) as llm:
        # The same prompts again, so that there is a prefix that might be taken.
        plain = llm.generate(prompts, params, use_tqdm=False)
        outputs = llm.generate(
            prompts, params, capture=[CAPTURE, None, CAPTURE], use_tqdm=False
        )
        steered = llm.generate(
            prompts[2],
            params,
            capture=("final",),
            edit={"layers.0.resid": Edit(add, np.linspace(-1, 1, 96))},
            use_tqdm=False,
        )
    for output, before in zip(outputs, plain, strict=True):
        assert output.outputs[0].token_ids == before.outputs[0].token_ids
    assert outputs[1].outputs[0].activations is None
    for index in (0, 2):
        (completion,) = outputs[index].outputs
        tokens = prompts[index] + completion.token_ids[:-1]
        expected = hooked(saved.model, tokens)
        assert set(expected) <= set(completion.activations)
        for activation, values in expected.items():
            got = completion.activations[activation]
            assert got.shape == values.shape, activation
            np.testing.assert_allclose(got, values, atol=TOLERANCE, err_msg=activation)
    check_steered(saved, prompts[2], steered[0].outputs[0])


def check_steered(saved, prompt, completion):
    """A vector added behind a layer, and to the bias of nothing else."""

    def shift(_module, _args, output):
        vector = torch.linspace(-1, 1, 96)
        if isinstance(output, tuple):
            return (output[0] + vector, *output[1:])
        return output + vector

    handle = saved.model.base_model.layers[0].register_forward_hook(shift)
    try:
        tokens = prompt + completion.token_ids
        scores = saved.logits(tokens)
        seen = hooked(saved.model, tokens[:-1])
    finally:
        handle.remove()
    greedy = scores[len(prompt) - 1 : -1].argmax(axis=-1).tolist()
    assert completion.token_ids == greedy
    np.testing.assert_allclose(
        completion.activations["final"], seen["final"], atol=TOLERANCE
    )
