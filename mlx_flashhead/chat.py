"""Talks with a FlashHead model: the flags of ``mlx_lm.chat`` and two more."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from .chatting.conversation import STOPPED, Answer, Conversation
from .chatting.messages import read_conversation, write_conversation
from .cli.arguments import adopt, whole_number
from .cli.console import command, sentence
from .cli.terminal import StopKey, Terminal
from .index.files import has_flash_head
from .models.compat import chat_parser
from .models.install import get_flash_head
from .models.load import load, load_dense, resolve
from .models.sampling import make_sampler

COMMANDS = {
    "/help": "what can be typed (or h)",
    "/reset": "begin a new conversation (or r)",
    "/stats": "settings, and figures of the conversation",
    "/probes": "N: clusters scored per token",
    "/dense": "score every token, or no longer",
    "/save": "FILE: write the conversation as JSON",
    "/load": "FILE: continue a conversation from there",
    "/exit": "leave (or q, or Ctrl-D)",
}
WITH_FILES = ("/save", "/load")
ALIASES = {"q": "/exit", "r": "/reset", "h": "/help", "/quit": "/exit"}  # letters as in mlx_lm.chat
HELP = """\
Ctrl-C stops an answer. A message that begins with a slash needs a space before it.
Up and down go through what was typed, Tab completes commands and files."""
NOT_LIMITED = "--max-kv-size has no effect: mlx-lm lets this model choose the size of its cache."
NO_FLASH_HEAD = "This model has no FlashHead: convert it with mlx_flashhead.convert."


def make_parser():
    """mlx-lm's parser, extended."""
    parser = adopt(
        chat_parser(),
        "mlx_flashhead.chat",
        "Talk with a FlashHead model.",
        {"model": "Folder or Hugging Face repository of a FlashHead checkpoint."},
    )
    parser.set_defaults(model=None)
    group = parser.add_argument_group("FlashHead")
    group.add_argument(
        "--n-probes",
        type=whole_number(1),
        help="Clusters scored per token (default: the number chosen at conversion).",
    )
    group.add_argument(
        "--dense", action="store_true", help="Begin with every token scored: the dense model."
    )
    return parser


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.chat``."""
    parser = make_parser()
    args = parser.parse_args()
    _check_arguments(parser, args)
    model, tokenizer = _load(args)
    mx.random.seed(args.seed)
    conversation = Conversation(
        model, tokenizer, system_prompt=args.system_prompt, max_kv_size=args.max_kv_size
    )
    sampler = make_sampler(
        args.temp,
        args.top_p,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
        model=model,
    )
    options = {
        "max_tokens": args.max_tokens,
        "prefill_step_size": args.prefill_step_size,
        "sampler": sampler,
    }
    Chat(conversation, Terminal([*COMMANDS], WITH_FILES), args, options).run()


class Chat:
    """Reads lines, answers messages and does what commands say.

    Args:
        conversation: With the model.
        terminal: Where it takes place.
        args: Of the command line.
        options: Of each answer.
    """

    def __init__(self, conversation: Conversation, terminal: Terminal, args, options: dict):
        self.conversation = conversation
        self.terminal = terminal
        self.name = args.model
        self.max_kv_size = args.max_kv_size
        self.head = get_flash_head(conversation.model)
        self.dense = args.dense
        self.options = options

    def run(self) -> None:
        """Until the end of the input or /exit."""
        if self.terminal.interactive:
            self.terminal.say(f"{self.name}, {self._settings()}. /help lists the commands.")
        if self.max_kv_size is not None and not self.conversation.cache.limited:
            self.terminal.say(NOT_LIMITED)
        while True:
            try:
                line = self.terminal.read()
            except EOFError:
                if self.terminal.interactive:
                    self.terminal.say("")
                return
            except KeyboardInterrupt:
                if not self.terminal.interactive:
                    raise
                self.terminal.say("\n/exit or Ctrl-D leaves.")
                continue
            if ALIASES.get(line.strip(), line.strip()) == "/exit":
                return
            try:
                self._do(line)
            except BrokenPipeError:
                raise
            except (ValueError, OSError) as error:
                self.terminal.say(sentence(error))

    def _do(self, line: str) -> None:
        line = ALIASES.get(line.strip(), line)
        if not line.strip():
            return
        if not line.startswith("/"):
            self._answer(line.strip())
            return
        name, _, argument = line.partition(" ")
        if name.strip() not in COMMANDS:
            raise ValueError(f"There is no command {name.strip()}: /help lists those there are.")
        getattr(self, f"_{name.strip()[1:]}")(argument.strip())

    def _answer(self, text: str) -> None:
        before = len(self.conversation.answers)
        try:
            with StopKey() as stopping:
                for piece in self.conversation.ask(
                    text, stopping=stopping, dense=self.dense, **self.options
                ):
                    self.terminal.show(piece)
        except KeyboardInterrupt:
            pass  # what there is stays
        finally:
            self.terminal.show("\n")
        if len(self.conversation.answers) == before:
            self.terminal.say("[stopped before the answer, the message is forgotten]")
        else:
            self.terminal.say(f"[{_figures(self.conversation.answers[-1])}]")

    def _help(self, _: str) -> None:
        for name, what in COMMANDS.items():
            self.terminal.say(f"  {name:8} {what}")
        self.terminal.say(HELP)

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        self.terminal.say("A new conversation.")

    def _stats(self, _: str) -> None:
        conversation = self.conversation
        answers = conversation.answers
        held = f"{len(conversation.cache.token_ids)} tokens in the cache"
        if conversation.cache.limited:
            held += f", which keeps the last {self.max_kv_size}"
        lines = [f"{self.name}, {self._settings()}"]
        lines.append(f"{_count(len(conversation.messages), 'message')}, {held}")
        if answers:
            lines.append(f"last answer: {_figures(answers[-1])}")
            seconds = sum(answer.seconds for answer in answers)
            tokens = sum(answer.n_tokens for answer in answers)
            after_first = tokens - len(answers)
            speed = f", {after_first / seconds:.1f} tokens/s" if seconds > 0 else ""
            lines.append(f"{_count(len(answers), 'answer')} of {_count(tokens, 'token')}{speed}")
        lines.append(f"memory at most {mx.get_peak_memory() / 1e9:.2f} GB")
        self.terminal.say("\n".join(lines))

    def _probes(self, argument: str) -> None:
        head = self._flash_head()
        if argument:
            try:
                n_probes = int(argument)
            except ValueError:
                raise ValueError(
                    f"/probes takes a whole number, 1 to {head.n_clusters}, and not {argument!r}."
                ) from None
            head.n_probes = n_probes
        self.terminal.say(f"Now {self._settings()}.")

    def _dense(self, _: str) -> None:
        self._flash_head()
        self.dense = not self.dense
        self.terminal.say(f"Now {self._settings()}.")

    def _save(self, argument: str) -> None:
        path = _path("/save", argument)
        write_conversation(path, self.conversation.messages, self.name)
        self.terminal.say(f"Wrote {_count(len(self.conversation.messages), 'message')} to {path}.")

    def _load(self, argument: str) -> None:
        path = _path("/load", argument)
        self.conversation.replace(read_conversation(path))
        self.terminal.say(f"Read {_count(len(self.conversation.messages), 'message')} from {path}.")

    def _flash_head(self):
        if self.head is None:
            raise ValueError(NO_FLASH_HEAD)
        return self.head

    def _settings(self) -> str:
        if self.head is None:
            return "dense, without FlashHead"
        clusters = f"{self.head.n_probes} of {self.head.n_clusters} clusters"
        return f"dense ({clusters} otherwise)" if self.dense else f"{clusters} scored per token"


def _figures(answer: Answer) -> str:
    figures = [_count(answer.n_tokens, "token")]
    if answer.tokens_per_second is not None:
        figures.append(f"{answer.tokens_per_second:.1f} tokens/s")
    if answer.head_share is not None:
        figures.append(f"{answer.head_share:.1%} of the time in the head")
    figures.append(f"prompt {answer.n_prompt} tokens, {answer.n_cached} from the cache")
    if answer.finish == STOPPED:
        figures.append("stopped")
    return ", ".join(figures)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _path(name: str, argument: str) -> Path:
    if not argument:
        raise ValueError(f"{name} needs the name of a file, such as {name} chat.json.")
    return Path(argument).expanduser()


def _load(args) -> tuple[nn.Module, object]:
    """The model with its FlashHead, which only ``--dense`` can do without, and the tokenizer."""
    folder = resolve(args.model)
    options = {
        "adapter_path": args.adapter_path,
        "tokenizer_config": {"trust_remote_code": args.trust_remote_code},
        "trust_remote_code": args.trust_remote_code,
    }
    if args.dense and not has_flash_head(folder):
        if args.n_probes is not None:
            raise ValueError(NO_FLASH_HEAD)
        return load_dense(folder, **options)[:2]
    return load(str(folder), n_probes=args.n_probes, **options)


def _check_arguments(parser, args) -> None:
    if args.model is None:
        parser.error("--model is needed: the folder or repository of a FlashHead checkpoint")
    if args.pipeline or mx.distributed.init().size() > 1:
        parser.error("a FlashHead model runs in one process: use mlx_lm.chat on several machines")


if __name__ == "__main__":
    main()
