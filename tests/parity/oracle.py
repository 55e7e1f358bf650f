"""Random checkpoints made by transformers, and what torch says of them."""

import dataclasses
import functools
import json
import pathlib
import tempfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jllm.config import EngineConfig
from jllm.engine.create import create_engine
from tests.engines import drain, tokens_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FAMILIES = {
    "cohere": (transformers.CohereConfig, transformers.CohereForCausalLM),
    "cohere2": (transformers.Cohere2Config, transformers.Cohere2ForCausalLM),
    "falcon": (transformers.FalconConfig, transformers.FalconForCausalLM),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "gpt_neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM),
    "granite": (transformers.GraniteConfig, transformers.GraniteForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM),
    "olmo3": (transformers.Olmo3Config, transformers.Olmo3ForCausalLM),
    "phi": (transformers.PhiConfig, transformers.PhiForCausalLM),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "smollm3": (transformers.SmolLM3Config, transformers.SmolLM3ForCausalLM),
    "stablelm": (transformers.StableLmConfig, transformers.StableLmForCausalLM),
    "starcoder2": (transformers.Starcoder2Config, transformers.Starcoder2ForCausalLM),
}
WHOLE = ("llama", "qwen3")
"""Families whose every path is tested; the others share the code of these."""
ODD = {
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 331,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
"""Sizes that no tile divides."""
VOCAB = ODD["vocab_size"]
SMALL = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "block_size": 8,
    "num_blocks": 128,
}
"""Few rows, so that programs compile in a moment; prompts take several chunks."""
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder, and the model that transformers loads from it, in float32."""

    folder: pathlib.Path
    model: object

    def logits(self, tokens):
        """Scores after each token, `[T, V]`."""
        with torch.no_grad():
            return self.model(torch.tensor([tokens])).logits[0].numpy()

    def logprobs(self, tokens):
        """Log-probabilities after each token, `[T, V]` in float64."""
        logits = torch.tensor(self.logits(tokens), dtype=torch.float64)
        return torch.log_softmax(logits, dim=-1).numpy()

    def greedy(self, prompt, count):
        """The tokens that `generate` adds."""
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        with torch.no_grad():
            tokens = self.model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=count
            )
        return tokens[0, len(prompt) :].tolist()


def checkpoint(family, *, dtype="float32", shard_size="1GB", **sizes):
    """A random checkpoint; every test that asks for the same one shares it.

    Sizes are those of ODD but for what is given; None leaves one out.
    """
    sizes = {k: v for k, v in (ODD | sizes).items() if v is not None}
    return _checkpoint(family, dtype, shard_size, json.dumps(sizes))


@functools.cache
def _checkpoint(family, dtype, shard_size, sizes):
    config_class, model_class = FAMILIES[family]
    model = model_class(config_class(**json.loads(sizes)))
    fill(model)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="jllm-parity-"))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
    return load(folder, model_class)


def rewritten(saved, config, rewrite):
    """The same weights under another architecture, that transformers does not have.

    Args:
        saved: A checkpoint.
        config: What its config.json has in addition.
        rewrite: Tensors by their names to those of the other architecture.
    """
    folder = pathlib.Path(tempfile.mkdtemp(prefix="jllm-parity-"))
    values = json.loads((saved.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    tensors = rewrite(load_file(saved.folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder, saved.model)


def load(folder, model_class):
    """What transformers reads from a folder; refuses a name that does not match."""
    torch.set_num_threads(1)
    model, info = model_class.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(info.values()), info
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return Checkpoint(folder, model.eval())


def fill(model):
    """Weights under which every part of the network shows in the scores.

    The ones of transformers are too small, its norms all one and its biases all zero.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, values in model.named_parameters():
            noise = torch.randn(values.shape, generator=generator)
            is_norm = "norm" in name or "ln_" in name
            if is_norm and name.endswith("weight"):
                values.copy_(1 + 0.2 * noise)
            elif values.ndim == 2:
                values.copy_(noise / values.shape[1] ** 0.5)
            else:
                values.copy_(0.2 * noise)


def random_prompt(length, seed=0, vocab=VOCAB):
    """Random tokens, of which longer prompts have the same first ones."""
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()


def engine_for(folder, **options):
    """A new engine; callers close it."""
    return create_engine(EngineConfig(model=str(folder), **SMALL | options))


def run_all(engine, requests):
    """Adds all requests; gives the tokens and the log-probabilities of each."""
    for item in requests:
        engine.add(item)
    outputs = drain(engine)
    assert all(output.finish_reason != "error" for output in outputs)
    entries = {}
    for output in outputs:
        entries.setdefault((output.request_id, output.index), []).extend(
            output.logprobs or ()
        )
    return tokens_of(outputs), entries, outputs


def check_entry(entry, expected, *, count, atol=TOLERANCE):
    """One position against the log-probabilities `[V]` of torch.

    Order and rank may differ between tokens that are as probable within `atol`.
    """
    own = expected[entry.token_id]
    assert entry.logprob == pytest.approx(own, abs=atol)
    above = np.sum(expected > own + atol)
    level = np.sum(expected > own - atol)
    assert above < entry.rank <= max(level, 1)
    ids = list(entry.top_ids)
    assert len(set(ids)) == len(ids) == count
    best = np.sort(expected)[::-1][:count]
    np.testing.assert_allclose(entry.top_logprobs, best, rtol=0, atol=atol)
    np.testing.assert_allclose(expected[ids], best, rtol=0, atol=2 * atol)
