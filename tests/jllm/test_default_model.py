"""The embedded model: small, complete, and able to tell a story in English."""

import json
import pathlib
import re

import pytest
from safetensors import safe_open

import jllm
from benchmarks.story_grammar import read_grammar, vocabulary

FOLDER = pathlib.Path(jllm.__file__).parent / "default_model"
FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
MAX_BYTES = 4_000_000
SAMPLES = 6
GREEDY = (
    ", there was a little girl named Ruby. She lived in a small village with "
    "her mother and father. Ruby was not very fast. The others called her "
    "slow. One sunny morning, there was a big race in the forest. A big girl "
    'named Emma wanted to win. "You are too slow," said Emma. "I will do my '
    'best," said Ruby. One, two, three, go! Emma ran away as fast as the '
    "wind. Ruby went slowly, step by step.\n"
    'Soon Emma was far ahead. "I have time for a nap," she thought. She '
    "closed her eyes and fell asleep. Ruby kept on going. She passed Emma "
    "very quietly. When Emma woke up, it was too late. Ruby had won the race!\n"
    'Everyone clapped for Ruby. "I am sorry that I laughed at you," said '
    "Emma. They shook hands and became friends. Slow and steady wins the "
    "race."
)
"""What follows "Once upon a time"; changes only when the model is trained anew."""


def read_json(name):
    return json.loads((FOLDER / name).read_text("utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def network():
    """The model as transformers loads it."""
    pytest.importorskip("torch")
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER, dtype="float32", output_loading_info=True
    )
    assert not any(info.values()), info
    return model


def generate(network, tokenizer, ids, **options):
    """Completions of one prompt, as token ids without the prompt."""
    import torch

    torch.manual_seed(0)
    prompt = torch.tensor([ids])
    out = network.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=300,
        top_k=0,
        **options,
    )
    return [row[len(ids) :].tolist() for row in out]


@pytest.fixture(scope="module")
def stories(network, tokenizer):
    """Sampled stories with nothing but the first token given."""
    made = generate(
        network,
        tokenizer,
        [tokenizer.bos_token_id],
        do_sample=True,
        temperature=read_json("generation_config.json")["temperature"],
        num_return_sequences=SAMPLES,
    )
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in made]


def chat(tokenizer, request):
    messages = [{"role": "user", "content": request}]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_folder_is_complete_and_small():
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(sizes) == FILES
    assert sum(sizes.values()) <= MAX_BYTES


def test_card_names_what_a_card_must():
    card = (FOLDER / "README.md").read_text("utf-8")
    for word in ("apache-2.0", "Held-out loss", "steps", "story_grammar", "seed"):
        assert word in card


def test_card_states_the_size_of_the_checkpoint():
    with safe_open(FOLDER / "model.safetensors", "numpy") as file:
        count = sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118
    card = (FOLDER / "README.md").read_text("utf-8")
    assert f"{count / 1e6:.2f} million parameters" in card


def test_special_tokens_agree(tokenizer):
    config, generation = read_json("config.json"), read_json("generation_config.json")
    for settings in (config, generation):
        assert settings["bos_token_id"] == tokenizer.bos_token_id
        assert settings["eos_token_id"] == tokenizer.eos_token_id
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.model_max_length == config["max_position_embeddings"]


def test_prompts_start_with_the_first_token_once(tokenizer):
    assert tokenizer("").input_ids == [tokenizer.bos_token_id]
    assert tokenizer("Once upon a time").input_ids[0] == tokenizer.bos_token_id
    assert chat(tokenizer, "Hello!").count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("text", ["Once upon a time", "Zoë & 東京 😀\n\ttab", " a  b "])
def test_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_template_takes_parts_and_leaves_out_system_messages(tokenizer):
    parts = [{"type": "text", "text": "Hello!"}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
    ]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert text == "<|bos|><|user|>Hello!<|end|><|assistant|>"


def test_greedy_text(network, tokenizer):
    prompt = tokenizer("Once upon a time").input_ids
    (ids,) = generate(network, tokenizer, prompt, do_sample=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == GREEDY
    assert ids[-1] == tokenizer.eos_token_id


def test_stories_are_finished_and_of_known_words(stories):
    words = [w for story in stories for w in re.findall(r"[a-z]+", story.lower())]
    assert len(words) > 60 * SAMPLES
    known = vocabulary()
    assert sum(word in known for word in words) > 0.995 * len(words)
    assert sum(story.endswith((".", '"')) for story in stories) >= SAMPLES - 1
    assert len(set(stories)) == SAMPLES


def test_stories_keep_to_their_characters(stories):
    tables = read_grammar().tables
    names = {name for table in ("he", "she") for (name,) in tables[table]}
    counts = [len(names & set(re.findall(r"[A-Z][a-z]+", s))) for s in stories]
    assert sum(count <= 2 for count in counts) >= 0.85 * SAMPLES


def test_requests_are_heard(network, tokenizer):
    for hero in ("dog", "fox", "princess", "dragon"):
        ids = chat(tokenizer, f"Tell me a story about a {hero}.")
        (made,) = generate(network, tokenizer, ids, do_sample=False)
        assert hero in tokenizer.decode(made, skip_special_tokens=True)
