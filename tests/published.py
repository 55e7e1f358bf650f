"""Parameter counts that were published, and where.

The stored copies of public pages were searched for each figure on 2026-11-22; the Hub
itself could not be asked. `HUB` stands for `safetensors.total` of
https://huggingface.co/api/models/NAME as public code quotes it, `CARD` for
https://huggingface.co/NAME. A figure that is rounded is compared as far as it goes.
"""

from typing import NamedTuple

HUB = "safetensors.total of the model's entry on huggingface.co"
CARD = "the model card on huggingface.co"
PYTHIA = "https://github.com/EleutherAI/pythia, table of the models"
STARCODER2 = "https://arxiv.org/abs/2402.19173, abstract"
PROMPTLAYER = "https://www.promptlayer.com/models/starcoder2-3b"
AYA = "HUB of CohereForAI/aya-expanse-8b, which has the same sizes"
INTERNLM2 = "HUB of internlm/internlm2_5-7b-chat, which has the same sizes"


class Published(NamedTuple):
    """A model, and what was said of it.

    Attributes:
        architecture: Name in its config.json.
        config: The sizes that its count depends on.
        count: Weights that it has, each once.
        figure: What was published, None where nothing was found.
        source: Where.
        stored_twice: Weights that the files hold again, which the figure counts.
    """

    architecture: str
    config: dict
    count: int
    figure: str | None
    source: str | None
    stored_twice: int = 0


def rounded_like(figure, count):
    """The count, written as a figure is: 124M, 3.03B, or all digits."""
    unit = {"M": 1e6, "B": 1e9}.get(figure[-1])
    if unit is None:
        return f"{count:,}"
    decimals = len(figure[:-1].partition(".")[2])
    return f"{count / unit:.{decimals}f}{figure[-1]}"


KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
FALCON = {
    "vocab_size": 65024,
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "num_kv_heads": 71,
}
FALCON_40B = {
    "new_decoder_architecture": True,
    "hidden_size": 8192,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_kv_heads": 8,
}
GPT2 = {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12}


def sizes(*values, **more):
    return dict(zip(KEYS, values, strict=True)) | more


MODELS = {
    "openai-community/gpt2": Published(
        "GPT2LMHeadModel",
        GPT2,
        124_439_808,
        "124M",
        CARD,
    ),
    "mistralai/Mistral-7B-v0.1": Published(
        "MistralForCausalLM",
        sizes(32000, 4096, 14336, 32, 32, 8, sliding_window=4096),
        7_241_732_096,
        "7,241,732,096",
        HUB,
    ),
    "Qwen/Qwen2.5-7B": Published(
        "Qwen2ForCausalLM",
        sizes(152064, 3584, 18944, 28, 28, 4),
        7_615_616_512,
        "7,615,616,512",
        HUB,
    ),
    "Qwen/Qwen2.5-0.5B": Published(
        "Qwen2ForCausalLM",
        sizes(151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True),
        494_032_768,
        "494,032,768",
        HUB,
    ),
    "google/gemma-2-2b": Published(
        "Gemma2ForCausalLM",
        sizes(256000, 2304, 9216, 26, 8, 4),
        2_614_341_888,
        "2,614,341,888",
        HUB,
    ),
    "google/gemma-2-9b": Published(
        "Gemma2ForCausalLM",
        sizes(256000, 3584, 14336, 42, 16, 8),
        9_241_705_984,
        "9,241,705,984",
        HUB,
    ),
    "google/gemma-3-1b-pt": Published(
        "Gemma3ForCausalLM",
        sizes(262144, 1152, 6912, 26, 4, 1),
        999_885_952,
        "999,885,952",
        HUB,
    ),
    "microsoft/phi-2": Published(
        "PhiForCausalLM",
        sizes(51200, 2560, 10240, 32, 32, 32, partial_rotary_factor=0.4),
        2_779_683_840,
        "2,779,683,840",
        HUB,
    ),
    "microsoft/Phi-3-mini-4k-instruct": Published(
        "Phi3ForCausalLM",
        sizes(32064, 3072, 8192, 32, 32, 32, sliding_window=2047),
        3_821_079_552,
        "3,821,079,552",
        HUB,
    ),
    "microsoft/phi-4": Published(
        "Phi3ForCausalLM",
        sizes(100352, 5120, 17920, 40, 40, 10),
        14_659_507_200,
        "14,659,507,200",
        HUB,
    ),
    "EleutherAI/pythia-70m": Published(
        "GPTNeoXForCausalLM",
        sizes(50304, 512, 2048, 6, 8, 8),
        70_426_624,
        "70,426,624",
        PYTHIA,
    ),
    "EleutherAI/pythia-1.4b": Published(
        "GPTNeoXForCausalLM",
        sizes(50304, 2048, 8192, 24, 16, 16),
        1_414_647_808,
        "1,414,647,808",
        PYTHIA,
    ),
    "tiiuae/falcon-7b": Published(
        "FalconForCausalLM",
        FALCON,
        6_921_720_704,
        "7,217,189,760",
        HUB,
        stored_twice=65024 * 4544,
    ),
    "tiiuae/falcon-40b": Published(
        "FalconForCausalLM",
        FALCON | FALCON_40B,
        41_303_293_952,
        "41,835,970,560",
        HUB,
        stored_twice=65024 * 8192,
    ),
    "HuggingFaceTB/SmolLM3-3B": Published(
        "SmolLM3ForCausalLM",
        sizes(128256, 2048, 11008, 36, 16, 4),
        3_075_098_624,
        "3,075,098,624",
        HUB,
    ),
    "ibm-granite/granite-3.3-2b-instruct": Published(
        "GraniteForCausalLM",
        sizes(49159, 2048, 8192, 40, 32, 8, tie_word_embeddings=True),
        2_533_539_840,
        "2,533,539,840",
        HUB,
    ),
    "allenai/OLMo-2-1124-7B": Published(
        "Olmo2ForCausalLM",
        sizes(100352, 4096, 11008, 32, 32, 32),
        7_298_617_344,
        "7,298,617,344",
        HUB,
    ),
    "allenai/Olmo-3-1025-7B": Published(
        "Olmo3ForCausalLM",
        sizes(100278, 4096, 11008, 32, 32, 32),
        7_298_011_136,
        "7,298,011,136",
        HUB,
    ),
    "CohereLabs/c4ai-command-r-v01": Published(
        "CohereForCausalLM",
        sizes(256000, 8192, 22528, 40, 64, 64),
        34_980_831_232,
        "35B",
        CARD,
    ),
    "CohereLabs/c4ai-command-r7b-12-2024": Published(
        "Cohere2ForCausalLM",
        sizes(256000, 4096, 14336, 32, 32, 8),
        8_028_033_024,
        "8,028,033,024",
        AYA,
    ),
    "bigcode/starcoder2-3b": Published(
        "Starcoder2ForCausalLM",
        sizes(49152, 3072, 12288, 30, 24, 2),
        3_030_371_328,
        "3.03B",
        PROMPTLAYER,
    ),
    "bigcode/starcoder2-7b": Published(
        "Starcoder2ForCausalLM",
        sizes(49152, 4608, 18432, 32, 36, 4),
        7_173_923_840,
        "7B",
        STARCODER2,
    ),
    "stabilityai/stablelm-2-1_6b": Published(
        "StableLmForCausalLM",
        sizes(100352, 2048, 5632, 24, 32, 32, use_qkv_bias=True),
        1_644_515_328,
        "1,644,515,328",
        HUB,
    ),
    "stabilityai/stablelm-3b-4e1t": Published(
        "StableLmForCausalLM",
        sizes(50304, 2560, 6912, 32, 32, 32),
        2_795_443_200,
        "2,795,443,200",
        CARD,
    ),
    "internlm/internlm2-7b": Published(
        "InternLM2ForCausalLM",
        sizes(92544, 4096, 14336, 32, 32, 8),
        7_737_708_544,
        "7,737,708,544",
        INTERNLM2,
    ),
    "internlm/internlm3-8b-instruct": Published(
        "InternLM3ForCausalLM",
        sizes(128512, 4096, 10240, 48, 32, 2, head_dim=128),
        8_804_241_408,
        None,
        None,
    ),
}

LLAMA_8B, LLAMA_70B, LLAMA_405B = 8_030_261_248, 70_553_706_496, 405_853_388_800
"""`HUB` of meta-llama/Llama-3.1-8B, -70B and -405B."""
QWEN3_32B = 32_762_123_264
"""`HUB` of Qwen/Qwen3-32B."""

# The smaller ones have their head in the files twice.
IN_THE_DATA = {
    "Qwen--Qwen3-0.6B": 751_632_384 - 151936 * 1024,
    "Qwen--Qwen3-1.7B": 2_031_739_904 - 151936 * 2048,
    "Qwen--Qwen3-8B": 8_190_735_360,
    "Qwen--Qwen3-32B": QWEN3_32B,
    "Qwen--Qwen3-32B-FP8": QWEN3_32B,
    "Qwen--Qwen3-32B-FP8-Static-PerTensor": QWEN3_32B,
    "meta-llama--Meta-Llama-3.1-8B": LLAMA_8B,
    "meta-llama--Meta-Llama-3.1-70B": LLAMA_70B,
    "meta-llama--Meta-Llama-3.1-405B": LLAMA_405B,
    "nvidia--Llama-3.1-70B-Instruct-FP8": LLAMA_70B,
}
"""Of the config.json files in the test data: `HUB`; of quantized models the figure of
the model that they were made from."""
