"""Trains the embedded model: text, tokenizer, network and checkpoint, from nothing.

The text comes from the grammar beside this file. The network is trained through jllm's
own `forward`: a step is one packed batch in which every document is a row of its own,
as in the engine. Needs optax (`pip install 'jllm[train]'`) and half an hour on two CPU
cores; run it from the root of the repository:

    python -m benchmarks.train_default_model --output jllm/default_model
"""

import argparse
import dataclasses
import datetime as dt
import functools
import itertools
import json
import os
import pathlib
import random
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from benchmarks.story_grammar import make_conversation, make_story
from jllm.bench.environment import processor
from jllm.layers.batch import Batch
from jllm.models.base import Model, ModelOptions, ParamSpec
from jllm.models.registry import build_model
from jllm.weights.random import random_weights

BOS, END, USER, ASSISTANT = "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"
BOS_ID, END_ID, USER_ID, ASSISTANT_ID = range(4)
CONTEXT = 512
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 1536,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "bos_token_id": BOS_ID,
    "eos_token_id": END_ID,
    "torch_dtype": "float32",
}
TEMPLATE = f"""\
{{{{ bos_token }}}}
{{%- for message in messages %}}
    {{%- if message.role in ("user", "assistant") %}}
        {{{{- "<|" + message.role + "|>" }}}}
        {{%- if message.content is string %}}
            {{{{- message.content | trim }}}}
        {{%- else %}}
            {{%- for part in message.content %}}{{{{- part.text }}}}{{%- endfor %}}
        {{%- endif %}}
        {{{{- "{END}" }}}}
    {{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{- "{ASSISTANT}" }}}}{{%- endif %}}
"""
CONVERSATION_SHARE = 0.55
HELD_OUT_DOCUMENTS = 200


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How long and how fast to train."""

    steps: int
    opening_share: float = 0.3
    seed: int = 0
    matrix_rate: float = 6e-3
    adam_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    tokenizer_documents: int = 20_000
    evaluation_interval: int = 250


@dataclasses.dataclass(frozen=True)
class Shape:
    """A compiled size: documents of at most `length` tokens, `rows` of them."""

    length: int
    rows: int
    tokens: int = 1536


OPENINGS = (Shape(64, 28),)
SHAPES = (Shape(256, 12), Shape(CONTEXT, 6))


@dataclasses.dataclass(frozen=True)
class Document:
    """Token ids, and which of them the model is to learn to say."""

    tokens: list[int]
    is_learned: list[bool]


# --- text ---------------------------------------------------------------------


def conversation_of(seed: str) -> list[tuple[str, str]]:
    """A conversation, or one turn without a request: a story alone."""
    if random.Random(f"{seed} share").random() < CONVERSATION_SHARE:
        return make_conversation(seed)
    return [("", make_story(seed))]


def train_tokenizer(num_documents: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer on documents of the grammar."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[BOS, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (
        text
        for number in range(num_documents)
        for turn in conversation_of(f"tokenizer {number}")
        for text in turn
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, BOS_ID)],
    )
    return tokenizer


def encode(tokenizer: Tokenizer, turns: list[tuple[str, str]]) -> Document:
    """Lays a conversation out as the chat template does."""
    tokens, is_learned = [BOS_ID], [False]

    def add(ids: list[int], learned: bool) -> None:
        tokens.extend(ids)
        is_learned.extend([learned] * len(ids))

    for request, answer in turns:
        if request:
            ids = tokenizer.encode(request, add_special_tokens=False).ids
            add([USER_ID, *ids, END_ID, ASSISTANT_ID], False)
        add([*tokenizer.encode(answer, add_special_tokens=False).ids, END_ID], True)
    return Document(tokens, is_learned)


def documents(tokenizer: Tokenizer, seed: str) -> Iterator[Document]:
    """All documents of a seed, without end."""
    number = 0
    while True:
        yield encode(tokenizer, conversation_of(f"{seed} {number}"))
        number += 1


# --- batches ------------------------------------------------------------------


def openings(source: Iterator[Document], length: int) -> Iterator[Document]:
    """The first tokens of documents: a request and the sentences that take it up.

    A name has few other words before it here, so that attention learns to find it.
    """
    for document in source:
        size = length + 1
        yield Document(document.tokens[:size], document.is_learned[:size])


def packed(
    source: Iterator[Document], shapes: tuple[Shape, ...] = SHAPES
) -> Iterator[tuple[Shape, list[Document]]]:
    """Collects documents until the batch of their size is full."""
    waiting: dict[Shape, list[Document]] = {shape: [] for shape in shapes}
    for document in source:
        size = len(document.tokens) - 1
        shape = next((s for s in shapes if size <= s.length), None)
        if shape is None:
            continue
        group = waiting[shape]
        used = sum(len(d.tokens) - 1 for d in group)
        if len(group) == shape.rows or used + size > shape.tokens:
            yield shape, group
            waiting[shape] = [document]
        else:
            group.append(document)
    for shape, group in waiting.items():
        if group:
            yield shape, group


def lessons(
    recipe: Recipe, tokenizer: Tokenizer
) -> Iterator[tuple[Shape, list[Document]]]:
    """The batches of a training, short beginnings first."""
    source = documents(tokenizer, f"train {recipe.seed}")
    (shape,) = OPENINGS
    short = packed(openings(source, shape.length), OPENINGS)
    yield from itertools.islice(short, round(recipe.opening_share * recipe.steps))
    yield from packed(source)


def to_arrays(
    shape: Shape, group: list[Document]
) -> tuple[Batch, np.ndarray, np.ndarray]:
    """The batch of a group, the tokens that follow, and their weights in the loss."""
    sizes = [len(document.tokens) - 1 for document in group]
    lengths = np.array(sizes + [0] * (shape.rows - len(group)), np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens, targets = np.zeros((2, shape.tokens), np.int32)
    weights = np.zeros(shape.tokens, np.float32)
    positions = np.zeros(shape.tokens, np.int32)
    # Padding goes to distinct slots past the pool, where nothing is written.
    slots = shape.rows * shape.length + np.arange(shape.tokens, dtype=np.int32)
    for row, document in enumerate(group):
        place = slice(starts[row], starts[row + 1])
        tokens[place] = document.tokens[:-1]
        targets[place] = document.tokens[1:]
        weights[place] = document.is_learned[1:]
        positions[place] = np.arange(sizes[row])
        slots[place] = row * shape.length + np.arange(sizes[row])
    batch = Batch(
        tokens=jnp.asarray(tokens),
        positions=jnp.asarray(positions),
        slots=jnp.asarray(slots),
        block_tables=jnp.arange(shape.rows, dtype=jnp.int32)[:, None],
        row_starts=jnp.asarray(starts),
        lengths=jnp.asarray(lengths),
    )
    return batch, targets, weights


# --- training -----------------------------------------------------------------


def loss_sum(model: Model, shape: Shape, weights, batch: Batch, targets, mask):
    """Sum of the cross-entropies of the learned tokens, from an empty cache.

    One block holds a whole document, so that a row's block table is its number.
    """
    kv = model.init_kv(shape.rows, shape.length)
    hidden, _ = model.forward(weights, kv, batch)
    logits = model.logits(weights, hidden)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(losses * mask)


def first_weights(specs, shardings, seed: int, config: dict):
    """Random weights from which the model soon learns to repeat a name.

    The output of attention starts as the transpose of its values and the MLPs add
    nothing: a token that attention looks at has a higher score from the first step on,
    so that looking at the right one is all that is left to learn.
    """
    weights = random_weights(specs, shardings, "float32", seed)
    head_dim, heads = config["head_dim"], config["num_attention_heads"]
    weights["embed"] = 0.5 * weights["embed"]
    for layer in weights["layers"]:
        values = layer["qkv"][:, -head_dim:]  # [K, D, E]
        values = jnp.repeat(values, heads // config["num_key_value_heads"], axis=0)
        layer["out"] = 0.25 * values.reshape(heads * head_dim, -1).T
        layer["down"] = jnp.zeros_like(layer["down"])
    return weights


def make_optimizer(recipe: Recipe, specs) -> optax.GradientTransformation:
    """Muon for the matrices of the layers, Adam for embedding and norms.

    After 500 steps the held-out loss was 0.70, against 0.74 with AdamW alone.
    Source: Jordan et al., Muon, 2024; scaled as in Liu et al., arXiv:2502.16982.
    """

    def matrix_axes(path, spec: ParamSpec):
        if path[0].key != "layers":
            return None
        last = len(spec.shape) - 1
        return optax.contrib.MuonDimensionNumbers(
            reduction_axis=last, output_axis=last - 1
        )

    def schedule(peak: float):
        return optax.warmup_cosine_decay_schedule(
            0.0, peak, recipe.warmup_steps, recipe.steps, 0.02 * peak
        )

    muon = optax.contrib.muon(
        schedule(recipe.matrix_rate),
        adam_b2=0.98,
        adam_learning_rate=schedule(recipe.adam_rate),
        muon_weight_dimension_numbers=jax.tree_util.tree_map_with_path(
            matrix_axes, specs
        ),
        consistent_rms=0.2,
        weight_decay=recipe.weight_decay,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def make_steps(model: Model, optimizer: optax.GradientTransformation):
    """The jitted training step and the jitted loss."""

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def train_step(shape, weights, state, batch, targets, mask):
        def mean(weights):
            total = loss_sum(model, shape, weights, batch, targets, mask)
            return total / jnp.sum(mask)

        loss, gradients = jax.value_and_grad(mean)(weights)
        updates, state = optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state, loss

    return train_step, jax.jit(functools.partial(loss_sum, model), static_argnums=0)


def held_out_loss(evaluate, weights, groups) -> float:
    """Mean cross-entropy in nats per learned token."""
    total = count = 0.0
    for shape, group in groups:
        batch, targets, mask = to_arrays(shape, group)
        total += float(evaluate(shape, weights, batch, targets, mask))
        count += float(mask.sum())
    return total / count


def train(recipe: Recipe, tokenizer: Tokenizer, output: pathlib.Path) -> dict:
    """Trains, writing the checkpoint whenever the held-out loss is the best so far."""
    options = ModelOptions(max_model_len=CONTEXT, attention="reference")
    model = build_model(CONFIG, options)
    specs = model.specs()
    device = SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: device, specs)
    weights = first_weights(specs, shardings, recipe.seed, CONFIG)
    optimizer = make_optimizer(recipe, specs)
    state = jax.jit(optimizer.init)(weights)
    train_step, evaluate = make_steps(model, optimizer)
    held_out = documents(tokenizer, f"held out {recipe.seed}")
    held_out = [next(held_out) for _ in range(HELD_OUT_DOCUMENTS)]
    held_out = list(packed(iter(held_out)))
    best, learned, start = float("inf"), 0, time.time()
    batches = lessons(recipe, tokenizer)
    for step, (shape, group) in zip(range(1, recipe.steps + 1), batches, strict=False):
        batch, targets, mask = to_arrays(shape, group)
        weights, state, loss = train_step(shape, weights, state, batch, targets, mask)
        learned += int(mask.sum())
        if step % 50 == 0:
            rate = learned / (time.time() - start)
            print(
                f"step {step}: loss {float(loss):.3f}, {rate:.0f} tokens/s", flush=True
            )
        if step % recipe.evaluation_interval == 0 or step == recipe.steps:
            found = held_out_loss(evaluate, weights, held_out)
            print(f"step {step}: held-out loss {found:.4f}", flush=True)
            if found < best:
                best = found
                write_weights(specs, weights, output)
    return {
        "steps": recipe.steps,
        "tokens": learned,
        "loss": best,
        "minutes": (time.time() - start) / 60,
    }


# --- checkpoint ---------------------------------------------------------------


def checkpoint_tensors(specs, weights, config: dict) -> dict[str, np.ndarray]:
    """Undoes the fusing of parameters: tensors by their names in the checkpoint."""
    tensors: dict[str, np.ndarray] = {}

    def split(spec: ParamSpec, array) -> None:
        sizes = part_sizes(spec, config)
        sections = np.split(np.asarray(array), np.cumsum(sizes)[:-1], spec.concat_axis)
        for part, section in zip(spec.parts, sections, strict=True):
            shape = tensor_shape(part.name, section, config)
            tensors[part.name] = np.ascontiguousarray(section.reshape(shape))

    jax.tree.map(split, specs, weights)
    return tensors


def part_sizes(spec: ParamSpec, config: dict) -> list[int]:
    """Extent of each part along the axis of concatenation."""
    extent = spec.shape[spec.concat_axis]
    if "q_proj" in spec.parts[0].name:
        head_dim = config["head_dim"]
        return [extent - 2 * head_dim, head_dim, head_dim]
    return [extent // len(spec.parts)] * len(spec.parts)


def tensor_shape(name: str, section: np.ndarray, config: dict) -> tuple[int, ...]:
    """Shape in the checkpoint: vectors for norms, else matrices with outputs first."""
    if "norm" in name:
        return (section.size,)
    return (section.size // section.shape[-1], section.shape[-1])


def write_weights(specs, weights, output: pathlib.Path) -> None:
    """Writes model.safetensors and config.json."""
    tensors = checkpoint_tensors(specs, weights, CONFIG)
    path = output / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)
    write_json(output / "config.json", CONFIG)


def write_tokenizer(tokenizer: Tokenizer, output: pathlib.Path) -> None:
    """Writes tokenizer, chat template and the defaults of sampling."""
    tokenizer.save(str(output / "tokenizer.json"), pretty=False)
    write_json(
        output / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": END,
            "pad_token": END,
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
        },
    )
    (output / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    write_json(
        output / "generation_config.json",
        {
            "bos_token_id": BOS_ID,
            "eos_token_id": END_ID,
            "do_sample": True,
            "temperature": 0.7,
        },
    )


def write_json(path: pathlib.Path, value: dict) -> None:
    """Writes a dictionary as readable JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# The embedded model of jllm

A Qwen3-shaped network of {millions:.2f} million parameters that writes short stories in
simple English. It is there so that jllm can be tried without a download; it knows
nothing but stories, and it invents even those.

| | |
|---|---|
| Architecture | Qwen3: {layers} layers, width {width}, {heads} heads of {head_dim}, \
{kv_heads} KV heads, MLP {mlp}, tied embeddings |
| Vocabulary | {vocab}, byte-level BPE |
| Context | {context} tokens |
| Type | float32 |
| Text | the grammar `benchmarks/story_grammar.txt` alone, new documents in \
every step; no other text and no other model |
| Documents | {story_percent:.0f} % stories, {chat_percent:.0f} % requests with their \
stories |
| Training | {steps} steps, the first {opening_percent:.0f} % on the beginnings of \
documents alone; {tokens:.1f} million learned tokens, Muon and Adam, \
peak rates {rate:g} and {adam_rate:g}, seed {seed} |
| Held-out loss | {loss:.4f} nats per token |
| Made | {date}, in {minutes:.0f} minutes on {machine} |
| Licence | Apache-2.0 |

`python -m benchmarks.train_default_model` makes it again, training through jllm's own
`forward`.

A story begins at an empty prompt or goes on from a beginning such as "Once upon a
time" or "One day, a little fox". Through the chat template it answers a request such
as "Tell me a story about a dog." with a story. System messages are left out. A
temperature of 0.7 is a good choice. It follows no other instructions, and what it
writes is no fact.

Known limits: it knows a few dozen names, heroes and plots and tells no others. Two
characters may be given the same name when it draws no sample, now and then a person
has a paw, and a request that it does not understand gets some story or other.
"""


def write_card(recipe: Recipe, figures: dict, output: pathlib.Path) -> None:
    """Writes the model card."""
    parameters = (output / "model.safetensors").stat().st_size / 4
    text = CARD.format(
        millions=parameters / 1e6,
        layers=CONFIG["num_hidden_layers"],
        width=CONFIG["hidden_size"],
        heads=CONFIG["num_attention_heads"],
        head_dim=CONFIG["head_dim"],
        kv_heads=CONFIG["num_key_value_heads"],
        mlp=CONFIG["intermediate_size"],
        vocab=CONFIG["vocab_size"],
        context=CONTEXT,
        story_percent=100 * (1 - CONVERSATION_SHARE),
        chat_percent=100 * CONVERSATION_SHARE,
        steps=figures["steps"],
        opening_percent=100 * recipe.opening_share,
        tokens=figures["tokens"] / 1e6,
        rate=recipe.matrix_rate,
        adam_rate=recipe.adam_rate,
        seed=recipe.seed,
        loss=figures["loss"],
        date=dt.datetime.now(dt.UTC).date(),
        minutes=figures["minutes"],
        machine=f"{os.cpu_count()} cores of an {processor()}",
    )
    (output / "README.md").write_text(text, "utf-8")


def main() -> None:
    """Trains and writes the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a minute, a bad model")
    arguments = parser.parse_args()
    recipe = Recipe(steps=arguments.steps, seed=arguments.seed)
    if arguments.smoke:
        recipe = dataclasses.replace(
            recipe,
            steps=40,
            warmup_steps=10,
            tokenizer_documents=500,
            evaluation_interval=20,
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(recipe.tokenizer_documents)
    write_tokenizer(tokenizer, arguments.output)
    figures = train(recipe, tokenizer, arguments.output)
    write_card(recipe, figures, arguments.output)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
