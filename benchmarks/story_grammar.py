"""Writes short English stories from a grammar; the text of the embedded model.

The words, the plots and the notation are in `story_grammar.txt`. A story depends on its
seed alone. A conversation asks for a story by something that occurs in it.
"""

import dataclasses
import functools
import pathlib
import random
import re

SOURCE = pathlib.Path(__file__).with_name("story_grammar.txt")
CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{([A-Za-z]+)(\d*)(?:\.(\w+))?\}")
SENTENCE_START = re.compile(r"(^|[.!?] |\.\" )([a-z])")
ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])(?!uni|one|use)")

OPENING_SHARE = 0.75
PARAGRAPHS_SHARE = 0.7
PERSON_SHARE = 0.35
NAMED_SHARE = 0.75
NIGHT_PLOTS = ("sleep", "noise", "snow")
ALWAYS_NAMED = ("boy", "girl")
FIELDS = {
    "place": ("where", "at", "to"),
    "fear": ("what", "event"),
    "build": ("what", "event"),
    "wish": ("what", "lack"),
    "elder": ("what", "he", "his"),
}
"""Names of the fields of tables of which a template may use more than the first."""

Entry = tuple[str, ...]
Turn = tuple[str, str]
"""What a user says, and the answer."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plot:
    """Lines of one plot, and what a reader may ask for to be told it."""

    name: str
    topics: Entry
    lines: Entry


@dataclasses.dataclass(frozen=True, slots=True)
class Grammar:
    """Word tables by name, and the plots."""

    tables: dict[str, tuple[Entry, ...]]
    plots: tuple[Plot, ...]


@functools.cache
def read_grammar() -> Grammar:
    """Reads the grammar's source."""
    tables: dict[str, tuple[Entry, ...]] = {}
    plots: list[Plot] = []
    text = re.sub(r"^#.*\n", "", SOURCE.read_text("utf-8"), flags=re.MULTILINE)
    for section in re.split(r"\n{2,}(?=\[\w+\]\n|== )", text.strip()):
        head, *lines = (line.strip() for line in section.splitlines())
        lines = [line for line in lines if line]
        if head.startswith("== "):
            plots.append(Plot(head[3:], _fields(lines[0]), tuple(lines[1:])))
        elif "{" in section or "[" in "".join(lines):
            tables[head.strip("[]")] = tuple((line,) for line in lines)
        else:
            tables[head.strip("[]")] = tuple(_fields(line) for line in lines)
    return Grammar(tables, tuple(plots))


def _fields(line: str) -> Entry:
    return tuple(field.strip() for field in line.split("|"))


@dataclasses.dataclass(frozen=True, slots=True)
class Character:
    """Somebody in a story, always of one name and one gender."""

    kind: str
    adjective: str
    home: str
    male: bool
    name: str | None
    is_person: bool

    def form(self, attribute: str | None) -> str:
        """The words for this character; without an attribute, how it is called."""
        plain = self.name or f"the {self.kind}"
        known_by = f"{self.name} the {self.kind}" if self.name else plain
        full = f"a {self.adjective} {self.kind}"
        his = "his" if self.male else "her"
        forms = {
            None: plain,
            "he": "he" if self.male else "she",
            "him": "him" if self.male else "her",
            "his": his,
            "kind": self.kind,
            "home": self.home,
            "an": full,
            "first": f"{full} named {self.name}" if self.name else full,
            "friend": plain if self.kind in ALWAYS_NAMED else known_by,
            "call": self.name
            or ("my friend" if self.is_person else "my little friend"),
            "hand": f"{his} hand" if self.is_person else f"{his} paw",
        }
        if attribute in ("He", "His"):
            return forms[attribute.lower()].capitalize()
        return forms[attribute]


class Storyteller:
    """One story in the making: its characters and the words chosen so far."""

    def __init__(self, seed: int | str) -> None:
        self._random = random.Random(seed)
        self._grammar = read_grammar()
        self._words: dict[tuple[str, str], Entry] = {}
        self._introduced: set[str] = set()
        hero = self._draw_character("adj", other=None)
        self._cast = {"h": hero, "f": self._draw_character("friendadj", other=hero)}
        self._plot = self._random.choice(self._grammar.plots)

    def story(self) -> str:
        """Tells the story."""
        parts: list[str] = []
        has_opening = self._random.random() < OPENING_SHARE
        if has_opening:
            parts.append(self._one_of("opening"))
            if self._random.random() < 0.4:
                parts.append(self._one_of("trait"))
        parts += self._kept_lines(self._plot.lines, has_opening)
        if self._plot.name in NIGHT_PLOTS:
            if self._random.random() < 0.3:
                parts.append("The end.")
        elif self._random.random() < 0.5:
            parts.append(self._one_of("ending"))
        break_ = "\n" if self._random.random() < PARAGRAPHS_SHARE else " "
        sentences = [_polish(self._expand(part)) for part in parts]
        return " ".join(sentences).replace(" --- ", break_)

    def request(self) -> str:
        """Asks for the story; call this after it has been told."""
        if self._random.random() < 0.12:
            return self._expand(self._one_of("askany"))
        ask = self._one_of("ask").replace("{subject}", self._subject())
        return _polish_article(self._expand(ask).strip())

    def _subject(self) -> str:
        hero, friend = self._cast["h"], self._cast["f"]
        topics = [t for t in self._plot.topics if self._is_told(t)]
        choices = [hero.form("an"), f"a {hero.kind}", f"a {hero.kind}"]
        if hero.name:
            choices += [f"a {hero.kind} named {hero.name}", hero.form("first")]
            if hero.kind in ALWAYS_NAMED:
                choices.append(hero.name)
        if "f" in self._introduced:
            choices += [f"a {hero.kind} and a {friend.kind}"] * 2
        things = [topic for topic in topics if topic.startswith("a {")]
        things = [topic for topic in things if "kind" not in topic]
        if things:
            choices.append(f"a {hero.kind} and {self._random.choice(things)}")
        choices += self._random.choices(topics, k=len(choices))
        return self._random.choice(choices)

    def _is_told(self, topic: str) -> bool:
        """Whether everything that a topic names occurs in the story."""
        for base, digit, _ in SLOT.findall(topic):
            if base in self._cast:
                if base not in self._introduced:
                    return False
            elif (base, digit) not in self._words:
                return False
        return True

    def _kept_lines(self, lines: Entry, has_opening: bool) -> list[str]:
        kept: list[str] = []
        for line in lines:
            flags, text = re.match(r"([~?!]*) ?(.*)", line).groups()
            optional = "?" in flags and self._random.random() < 0.5
            if not optional and (has_opening or "~" not in flags):
                kept.append(text)
        return kept

    def _one_of(self, table: str) -> str:
        """A line of a table of templates."""
        lines = [line for (line,) in self._grammar.tables[table]]
        if self._cast["h"].name is None:
            lines = [line for line in lines if not line.startswith("!")]
        return self._random.choice(lines).removeprefix("! ")

    def _expand(self, template: str) -> str:
        """Chooses among the choices, innermost first, then fills the slots."""
        while CHOICE.search(template):
            template = CHOICE.sub(
                lambda match: self._random.choice(match[1].split("|")), template
            )
        return SLOT.sub(self._fill, template)

    def _fill(self, slot: re.Match[str]) -> str:
        base, digit, attribute = slot.groups()
        if base.lower() in self._cast:
            return self._mention(base, attribute)
        entry = self._word(base, digit)
        if attribute == "last":
            return entry[0].split()[-1]
        return entry[FIELDS[base].index(attribute) if attribute else 0]

    def _mention(self, base: str, attribute: str | None) -> str:
        key = base.lower()
        if base.isupper() and key not in self._introduced:
            attribute = "first"
        if attribute in (None, "first", "friend", "an"):
            self._introduced.add(key)
        return self._cast[key].form(attribute)

    def _word(self, table: str, digit: str) -> Entry:
        if (table, digit) not in self._words:
            taken = [w for (name, _), w in self._words.items() if name == table]
            free = [w for w in self._grammar.tables[table] if w not in taken]
            self._words[table, digit] = self._random.choice(free)
        return self._words[table, digit]

    def _draw_character(self, adjectives: str, other: Character | None) -> Character:
        tables = self._grammar.tables
        is_person = self._random.random() < PERSON_SHARE
        kinds = tables["person" if is_person else "kind"]
        taken = () if other is None else (other.kind, other.name)
        entry = self._random.choice([k for k in kinds if k[0] not in taken])
        gender = entry[2] if is_person else "both"
        male = gender == "he" or (gender == "both" and self._random.random() < 0.5)
        names = [n for (n,) in tables["he" if male else "she"] if n not in taken]
        named = entry[0] in ALWAYS_NAMED or self._random.random() < NAMED_SHARE
        adjective = self._random.choice(tables[adjectives])[0]
        if adjectives == "adj" and self._random.random() < 0.35:
            adjective = "little"
        name = self._random.choice(names) if named else None
        return Character(entry[0], adjective, entry[1], male, name, is_person)


def _polish_article(text: str) -> str:
    return ARTICLE.sub(r"\1n ", text)


def _polish(text: str) -> str:
    """Capital letters at the start of sentences; "an" before vowels."""
    text = _polish_article(re.sub(" +", " ", text).strip())
    return SENTENCE_START.sub(lambda m: m[1] + m[2].upper(), text)


def make_story(seed: int | str) -> str:
    """Writes the story of a seed."""
    return Storyteller(seed).story()


def make_conversation(seed: int | str) -> list[Turn]:
    """Makes the conversation of a seed: mostly one request and its story."""
    draws, tables = random.Random(f"conversation {seed}"), read_grammar().tables
    turns: list[Turn] = []
    kind = draws.random()
    if kind < 0.06:
        turns.append(draws.choice(tables["hello"]))
        if draws.random() < 0.3:
            return turns
    teller = Storyteller(f"{seed} first")
    story = teller.story()
    asked = turns and "?" in turns[0][1] and draws.random() < 0.5
    turns.append(("Yes, please." if asked else teller.request(), story))
    if kind > 0.95:
        turns.append(draws.choice(tables["thanks"]))
    elif kind > 0.88:
        teller = Storyteller(f"{seed} second")
        story, request = teller.story(), teller.request()
        if draws.random() < 0.5:
            (request,) = draws.choice(tables["more"])
        turns.append((request, story))
    return turns


def vocabulary() -> set[str]:
    """Every word that a story can hold, in lower case."""
    grammar = read_grammar()
    texts = [text for table in grammar.tables.values() for e in table for text in e]
    texts += [line for plot in grammar.plots for line in plot.lines]
    plain = SLOT.sub(" ", " ".join(texts)).lower()
    forms = "a an the named he she him her his hand paw my little friend"
    return set(re.findall(r"[a-z]+", f"{plain} {forms}"))
