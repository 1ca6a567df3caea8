"""Per-domain cleaning rules: each removes one kind of markup or artefact, and never language.

A rule sees one non-blank line and returns it cleaned, or None to drop it. Blank lines separate documents
and stay with the caller, so no rule can glue two documents together. Which rules a domain gets is
DOMAIN_RULES, or the config's override of it:

    cleaner = Cleaner(rules_for("childes.train"))
    cleaner.line("*MOT:\\tput it as_well as xxx .")     # "*MOT:\\tput it as well as ."
    cleaner.counts                                     # lines changed and dropped by each rule, for the manifest

Left out on purpose: rejoining words hyphenated at a line end and italics or captions that span lines (both
need two lines), Unicode normalisation (it loses information), and guesses at OCR errors or missing words.
"""

import difflib
import html
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html.entities import html5
from pathlib import PurePath


@dataclass(frozen=True)
class Rule:
    name: str
    intent: str
    apply: Callable[[str], str | None]


def _substitute(marks: str, *replacements: tuple[str, str]) -> Callable[[str], str]:
    """Regex replacements in order, tried only on lines that hold one of the characters `marks`."""
    compiled = [(re.compile(pattern), new) for pattern, new in replacements]

    def apply(line: str) -> str:
        if any(mark in line for mark in marks):
            for pattern, new in compiled:
                line = pattern.sub(new, line)
        return line

    return apply


def _drop_matching(pattern: str) -> Callable[[str], str | None]:
    whole_line = re.compile(rf"\s*(?:{pattern})\s*", re.IGNORECASE)
    return lambda line: None if whole_line.fullmatch(line) else line


_SPEAKER_LABEL = re.compile(r"\s*(\*?[A-Z][A-Z0-9]{0,11}:)[^\S\t]*\t\s*")


def _split_label(line: str) -> tuple[str, str]:
    """("*MOT:\\t", "hello .") of "*MOT:\\thello ."; an empty label where the line has none."""
    label = _SPEAKER_LABEL.match(line) if "\t" in line else None
    return (label[1] + "\t", line[label.end() :]) if label else ("", line)


# --- any text ---------------------------------------------------------------------------------------------

# The zero-width joiner and non-joiner stay: Persian and Malayalam are spelled with them.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
_LINE_BREAK = re.compile("[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")  # what str.splitlines splits at, besides \n
_SPACES = re.compile(r"[^\S\u1680]+")  # the Ogham space mark is a visible stroke


def _repair(character: re.Match) -> str:
    """C1 controls in text are Windows-1252 bytes read as Latin-1: 0x92 is the apostrophe of "don't"."""
    code = ord(character[0])
    return bytes([code]).decode("cp1252", "ignore") if 0x80 <= code < 0xA0 else ""


def _collapse_spaces(line: str) -> str:
    label, speech = _split_label(line)
    return (label + _SPACES.sub(" ", speech).strip(" ")).rstrip("\t")


_MIN_SHOUTED_LETTERS = 10
_PRONOUN_I = re.compile(r"(?<![\w'’])i(?!\w)")
_SENTENCE_START = re.compile(r"(?:^|[.?!]\s+)[^\w\s]*\w")


def _sentence_case(line: str) -> str:
    """`str.isupper` is False for one lower-case letter and for no letters: "WORlD" and "12:30" stay."""
    label, speech = _split_label(line)
    if not speech.isupper() or sum(map(str.isalpha, speech)) <= _MIN_SHOUTED_LETTERS:
        return line
    lowered = _PRONOUN_I.sub("I", speech.lower())
    return label + _SENTENCE_START.sub(lambda start: start[0].upper(), lowered)


_ENTITY = re.compile(r"&(?:[A-Za-z][A-Za-z0-9]{1,30}|#\d{1,7}|#[xX][0-9A-Fa-f]{1,6});")


def _decode_entity(entity: re.Match) -> str:
    if entity[0][1] != "#" and entity[0][1:] not in html5:  # html.unescape would make "&notes;" "¬es;"
        return entity[0]
    decoded = html.unescape(entity[0])
    return " " if decoded.isspace() else decoded


_TAGS = (
    "b|big|blockquote|center|cite|code|div|em|font|gallery|h[1-6]|i|includeonly|li|math|noinclude|nowiki|ol|"
    "onlyinclude|p|poem|pre|ref|references|s|section|small|span|strong|sub|sup|table|td|th|tr|tt|u|ul"
)
_HTML_TAGS = _substitute(
    "<",
    (r"<ref\b(?:\s[^<>]*)?(?<!/)>[^<>]*</ref\s*>|<!--.*?-->", ""),
    (r"<br\s*/?>", " "),
    # an attribute needs its "=": "x <b and c> d" holds no tag
    (rf"</?(?:{_TAGS})(?:\s+[^<>]*=[^<>]*)?\s*/?>", ""),
)

# --- books and encyclopaedias -----------------------------------------------------------------------------

_REFERENCE_MARKS = _substitute("[", (r"\s*\[(?:\d{1,3}|note \d+|citation needed|edit)\]", ""))
_WIKI_MARKUP = _substitute(
    "[{'",
    (r"\[\[(?:File|Image|Category):[^\[\]]*\]\]|\{\{[^{}]*\}\}", ""),
    (r"\[\[(?:[^\[\]]*\|)?([^\[\]|]*)\]\]", r"\1"),
    (r"\[https?://\S+\s+([^\[\]]*)\]", r"\1"),
    (r"(?<!')('{2,3}|'{5})(?!')(.+?)(?<!')\1(?!')", r"\2"),
)
_EMPTY_BRACKETS = _substitute(
    "(",
    (r"\s+\([\s,;]*\)(?=[\s,.;:)]|$)|^\([\s,;]*\)\s+", ""),  # "main()" is no leftover: no space before it
    (r"\(\s*[,;][\s,;]*\s(?=\w)", "("),
)
_PLAIN_HEADINGS = _substitute("=", (r"^\s*(={2,6}|=(?: =){1,5})\s+(\S.*?)\s+\1\s*$", r"\2"))
_GUTENBERG_BOILERPLATE = _drop_matching(
    r"\*{3}\s*(?:START|END) OF\b.*|End of (?:the )?Project Gutenberg.*|Produced by .*Proofread.*"
    r"|\[(?:Illustration|Frontispiece|Blank Page|Pg|Page)\b[^\]]*\]?|\*[*\s]*"
    r"|[-–—\[({\s]*(?:(?:p\.|pg|page)\s*)?\d{1,3}[-–—\])}\s]*"
)
_GUTENBERG_ITALICS = _substitute("_", (r"(?<!\w)_(?=[^\W_]|[\"'(“‘])", ""), (r"(?<=[^\W_]|[.,;:!?\"')”’-])_(?!\w)", ""))
_PTB_ESCAPES = _substitute(
    "-`'",
    *((f"-{name}B-", mark) for name, mark in zip(("LR", "RR", "LS", "RS", "LC", "RC"), "()[]{}", strict=True)),
    (r"``|''", '"'),
)

# --- speech and subtitles ---------------------------------------------------------------------------------

_CHAT_CODES = _substitute(
    "xyw[<&+@(",
    (r"(?<!\S)(?:xxx|yyy|www)(?=[.,?!]*(?:\s|$))\s*", ""),  # unintelligible, phonetic, not transcribed
    (r"\[[^\[\]]*\]|[<>]|\(\.+\)", ""),  # annotations, their scope, pauses
    (r"(?<!\S)&=\S+", ""),  # sounds and gestures: &=laughs
    (r"(?<!\S)&[-+~]?(?=\w+(?![\w;]))", ""),  # the mark of a filler or fragment: &-uh
    (r"(?<=\w)@[a-z]{1,3}(?::\w+)?\b", ""),  # special form of the word: woof@o
    (r"(?<!\S)\+(?:[\"^<,+]|[\"/]*(?=[.?!]))", ""),  # linkers and terminators: +... is a trailing off
    (r"(?<=\w)\((\w+)\)|\((\w+)\)(?=\w)", r"\1\2"),  # sounds left out: (be)cause
)
_CHILDES_COMPOUNDS = _substitute("_+", (r"(?<=[^\W_])_+(?=[^\W_])", " "), (r"(?<=[^\W_])\+(?=[^\W_])", "-"))


def _childes_codes(line: str) -> str | None:
    """An utterance that was nothing but codes is dropped with its speaker label."""
    cleaned = _CHAT_CODES(line)
    return cleaned if cleaned == line or re.search(r"[^\W_]", _split_label(cleaned)[1]) else None


_SPOKEN_MARKUP = _substitute(
    "<{[/(*",
    (r" <<?[A-Za-z][^<>=]*>>?(?=[\s.,?!;]|$)|<<?[A-Za-z][^<>=]*>>?", ""),  # <laughter>, <<very faint>>
    (r"\{[A-Z] ([^{}]*?)\s*\}", r"\1"),  # {F uh, }: a filler
    (r"\[ ([^\[\]+]*?)\s*\+ ([^\[\]]*?)\s*\]", r"\1 \2"),  # [ I, + I ]: a restart
    (r"\(\(([^()]*)\)\)", r"\1"),  # ((perhaps)): an uncertain hearing
    (r"\s-?/(?=\s|$)", ""),  # the end of an utterance
    (r"\[(?:laugh(?:s|ter|ing)?|unclear|pause|cough(?:s|ing)?|nonverbal)\]", ""),
    (r"\s*\*slash error(?: should be \S+)?", ""),
    (r"\s*\*(?:listen|sv|b|(?:one|two|three|\d) utts?)[\s?.]*$", ""),  # transcribers' notes to each other
)
_SUBTITLE_MARKS = _substitute(
    "♪♫♬♩{[>-–—(",
    (r"[♪♫♬♩]+|\{\\[^{}]*\}|^\s*>>+|\[[^\[\]]*\]", ""),  # music, styles, change of speaker, [door slams]
    (r"(?i)\((?:laughter|laughs|applause|cheering|cheers|music|sighs|coughs|inaudible)\)", ""),
    (r"^\s*[-–—]\s*(?=[^\W\d_]|[\"'¿¡])", ""),  # a dialogue dash
)
_SUBTITLE_CREDITS = _drop_matching(
    r"\W*(?:sub(?:title[sd]?|s)?|(?:closed )?caption(?:s|ing|ed)?|(?:re)?sync(?:ed|hroni[sz]ed)?|ripped)"
    r"(?:[\s,&/]+(?:and|sync\w*|correct\w*|caption\w*|translat\w*|edited|made|provided|sponsored))*(?:\s+by\b|\s*:).*"
    r"|.*\b(?:opensubtitles|addic7ed|subscene|become VIP member)\b.*"
    r"|\W*(?:advertise your product or brand here|please rate this subtitle).*"
)

# --- the rules, and who gets them -------------------------------------------------------------------------

_ALL_RULES = (
    Rule("control_characters", "remove invisible characters, repair Windows-1252", lambda line: _CONTROL.sub(_repair, line)),
    Rule("collapse_spaces", "one space between words; a speaker label keeps its tab", _collapse_spaces),
    Rule("sentence_case", "lines wholly in capitals become sentences (captions)", _sentence_case),
    Rule("html_entities", "decode complete entities: &amp; but not AT&T", lambda line: _ENTITY.sub(_decode_entity, line)),
    Rule("html_tags", "remove HTML tags, and references with their text", _HTML_TAGS),
    Rule("reference_marks", "remove citation and footnote marks: [1]", _REFERENCE_MARKS),
    Rule("wiki_markup", "links become their text; templates, bold and italic marks go", _WIKI_MARKUP),
    Rule("empty_brackets", "remove the ( ) and (; that a lost template leaves", _EMPTY_BRACKETS),
    Rule("plain_headings", "= = = Title = = = becomes Title (in no default)", _PLAIN_HEADINGS),
    Rule("bare_urls", "drop lines that are only a web address", _drop_matching(r"(?:\W*\d+\.)?\s*(?:https?://|www\.)\S+")),
    Rule("gutenberg_boilerplate", "drop licence, picture, page and asterisk lines", _GUTENBERG_BOILERPLATE),
    Rule("gutenberg_italics", "_stressed_ loses its marks; snake_case and ____ stay", _GUTENBERG_ITALICS),
    Rule("ptb_escapes", "Penn Treebank escapes: -LRB- is (, `` is a quote", _PTB_ESCAPES),
    Rule("childes_codes", "remove CHAT codes: xxx, [laugh], &=laughs, +...", _childes_codes),
    Rule("childes_compounds", "as_well becomes as well, night+night night-night", _CHILDES_COMPOUNDS),
    Rule("spoken_markup", "remove <laughter>, {F uh, }, [ I, + I ], utterance slashes", _SPOKEN_MARKUP),
    Rule("subtitle_marks", "remove dialogue dashes, music, [sounds] and >>", _SUBTITLE_MARKS),
    Rule("subtitle_credits", "drop credits and advertisements", _SUBTITLE_CREDITS),
    Rule("speaker_labels", "remove *MOT: and A: (in no default)", lambda line: _split_label(line)[1]),
)
RULES: dict[str, Rule] = {rule.name: rule for rule in _ALL_RULES}


def _cleaned_of(*artefacts: str) -> tuple[str, ...]:
    return "control_characters", *artefacts, "collapse_spaces"


_CHILDES = _cleaned_of("childes_codes", "childes_compounds")
_BOOKS = _cleaned_of("reference_marks", "gutenberg_boilerplate", "gutenberg_italics")
_WIKI = _cleaned_of("html_tags", "html_entities", "wiki_markup", "reference_marks", "empty_brackets", "bare_urls")
_CAPTIONS = _cleaned_of("html_tags", "html_entities", "subtitle_marks", "subtitle_credits", "sentence_case")

DEFAULT_RULES = _cleaned_of()
DOMAIN_RULES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("aochildes", "childes"), _CHILDES),
    **dict.fromkeys(("bnc_spoken", "switchboard"), _cleaned_of("spoken_markup")),
    "cbt": _cleaned_of("ptb_escapes", "gutenberg_italics"),
    **dict.fromkeys(("children_stories", "gutenberg"), _BOOKS),
    **dict.fromkeys(("open_subtitles", "qed"), _CAPTIONS),
    **dict.fromkeys(("simple_wiki", "simple_wikipedia", "wikipedia"), _WIKI),
}


def domain_of(name: str) -> str:
    """The domain "open_subtitles" for the name train_10M/Open-Subtitles.train."""
    return PurePath(name).name.split(".")[0].lower().replace("-", "_").replace(" ", "_")


def rules_for(domain: str, overrides: Mapping[str, Sequence[str]] | None = None) -> tuple[str, ...]:
    """The names of the rules for a domain, or for its file.

    An override replaces the rules of the domain it names, or as "default" those of domains that have none of
    their own. Every override's rule names are checked, whichever domain is asked for.
    """
    replaced = {domain_of(name): tuple(rules) for name, rules in (overrides or {}).items()}
    _check_names(name for rules in replaced.values() for name in rules)
    chosen, name = {**DOMAIN_RULES, **replaced}, domain_of(domain)
    if name not in chosen:
        warnings.warn(
            f"no cleaning rules are meant for the domain {name!r}: it gets the default ones"
            f"{_did_you_mean(name, DOMAIN_RULES)} (domains: {', '.join(DOMAIN_RULES)})",
            stacklevel=2,
        )
    return chosen.get(name, replaced.get("default", DEFAULT_RULES))


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if name not in RULES:
            raise ValueError(f"unknown cleaning rule {name!r}{_did_you_mean(name, RULES)} (rules: {', '.join(RULES)})")


def _did_you_mean(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class Cleaner:
    """Applies rules to lines, and counts the lines that each rule changed or dropped."""

    def __init__(self, rules: Sequence[str]):
        _check_names(rules)
        self._rules = [RULES[name] for name in rules]
        self.counts = {name: {"changed": 0, "dropped": 0} for name in rules}

    def line(self, text: str) -> str | None:
        """The cleaned line, or None where nothing is left of it.

        The rules run until none changes anything, because removing one mark can uncover another: so cleaning
        a cleaned corpus changes nothing. It ends, because a rule makes a line shorter or plainer, never longer.
        """
        if "\n" in text:
            raise ValueError("Cleaner.line() takes one line: split the text first, and keep its blank lines")
        text = _LINE_BREAK.sub(" ", text)
        if not text.strip():
            return None
        changed, before = set(), None
        while text != before:
            before = text
            for rule in self._rules:
                cleaned = rule.apply(text)
                if not cleaned or cleaned.isspace():
                    self.counts[rule.name]["dropped"] += 1
                    return None
                if cleaned != text:
                    changed.add(rule.name)
                    text = cleaned
        for name in changed:
            self.counts[name]["changed"] += 1
        return text
