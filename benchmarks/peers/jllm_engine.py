"""jllm itself, through `LLM.generate`."""

from benchmarks.peers.protocol import Answer, NotInstalledError, Settings, cut


class Engine:
    """jllm with its default options."""

    def __init__(self, settings: Settings) -> None:
        from jllm import LLM, __version__

        self.version = __version__
        self._llm = LLM(
            settings.folder,
            dtype=settings.dtype,
            max_num_seqs=settings.max_num_seqs,
            max_model_len=settings.max_model_len,
            skip_tokenizer_init=True,
        )
        self._llm.wait_until_compiled()

    def run(self, prompts: list[list[int]], lengths: list[int]) -> list[Answer]:
        """See `Peer`."""
        from jllm import SamplingParams

        params = [
            SamplingParams(
                temperature=0, max_tokens=length, ignore_eos=True, detokenize=False
            )
            for length in lengths
        ]
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
        return [
            Answer(
                cut(list(output.outputs[0].token_ids), length),
                output.metrics.first_token_time,
                output.metrics.finished_time,
                output.num_cached_tokens,
            )
            for output, length in zip(outputs, lengths, strict=True)
        ]


def open_peer(settings: Settings) -> Engine:
    """Loads the model and compiles all its programs."""
    try:
        import jllm  # noqa: F401
    except ImportError as error:
        raise NotInstalledError(str(error)) from error
    return Engine(settings)
