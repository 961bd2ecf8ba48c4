"""The data of the demos: small tasks that can be learnt, written by templates; the student has the last of each."""

import random
from collections.abc import Sequence

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from datasets import Sequence as ListOf

PEOPLE = ["anna", "ben", "clara", "david", "eva", "frank", "greta", "hugo"]


def reviews(columns: Sequence[str]) -> dict[str, DatasetDict]:
    """Reviews of three kinds of things, good or bad; the student, of hotels, has few of them.

    Args:
        columns: The name of the text column, and perhaps of a second one, which asks about the first.

    Returns:
        `{task: data}` with the columns and `label`.
    """
    things = {
        "books": ["book", "story", "chapter", "poem", "cover"],
        "films": ["film", "actor", "scene", "music", "ending"],
        "hotels": ["hotel", "room", "breakfast", "bed", "garden"],
    }
    words = (
        ["bad", "awful", "boring", "ugly", "poor", "weak", "dirty", "sad"],
        ["good", "lovely", "exciting", "pretty", "rich", "strong", "clean", "happy"],
    )
    features = Features(
        {**{column: Value("string") for column in columns}, "label": ClassLabel(names=["bad", "good"])}
    )

    def split(nouns: list[str], size: int, rng: random.Random) -> Dataset:
        rows = []
        for index in range(size):
            noun, other, label = rng.choice(nouns), rng.choice(nouns), index % 2
            adverb, day = rng.choice(["very", "rather", "really"]), rng.choice(["monday", "friday", "sunday"])
            text = f"on {day} i saw the {other} and the {noun} was {adverb} {rng.choice(words[label])} ."
            rows.append([text, f"was the {noun} good ?"][: len(columns)] + [label])
        return Dataset.from_list([dict(zip(features, row, strict=True)) for row in rows], features=features)

    return {
        task: DatasetDict(
            train=split(nouns, 64 if task == "hotels" else 240, random.Random(1)),
            validation=split(nouns, 100, random.Random(2)),
        )
        for task, nouns in things.items()
    }


def questions(columns: Sequence[str]) -> dict[str, DatasetDict]:
    """Questions of customers of three kinds with their answers; the student, of a hotel, has few of them.

    Args:
        columns: The names of the columns with the question and the answer.

    Returns:
        `{task: data}`; in the validation data other openings than in the training lead to the same questions.
    """
    things = {
        "bank": {"card": "branch", "pin": "letter", "loan": "adviser", "account": "form", "fee": "list"},
        "railway": {"ticket": "counter", "seat": "map", "delay": "refund", "bike": "wagon", "dog": "basket"},
        "hotel": {"room": "key", "breakfast": "hall", "towel": "maid", "bed": "pillow", "garden": "gate"},
    }
    first, second = ["hello ,", "good morning ,", "please ,", "a question ,"], ["", "help me ,", "tell me ,"]
    openings = [f"{one} {other}" for one in first for other in second]
    held_out = {openings[1], openings[5], openings[6]}

    def split(answers: dict[str, str], opened: list[str], repeats: int) -> Dataset:
        rows = [
            [f"{opening} where is the {asked} ?", f"you get the {asked} from the {answer} ."]
            for _ in range(repeats)
            for opening in opened
            for asked, answer in answers.items()
        ]
        return Dataset.from_list([dict(zip(columns, row, strict=True)) for row in rows])

    return {
        task: DatasetDict(
            train=split(answers, [each for each in openings if each not in held_out], 1 if task == "hotel" else 4),
            validation=split(answers, sorted(held_out), 1),
        )
        for task, answers in things.items()
    }


def mentions() -> dict[str, DatasetDict]:
    """Sentences of three kinds with people and towns, tagged word by word; the student's kind, of sports, has few.

    Returns:
        `{task: data}` with the columns `tokens` and `ner_tags`.
    """
    towns = ["london", "paris", "new york", "oslo", "san remo", "madrid", "lisbon", "port louis"]
    templates = {
        "travel": ["yesterday {person} flew to {town} .", "the train from {town} brought {person} home ."],
        "work": ["our office in {town} hired {person} .", "{person} sells shoes in {town} and bread ."],
        "sports": ["in {town} the game was won by {person} .", "{person} ran around the lake of {town} ."],
    }
    tags = ClassLabel(names=["O", "B-PER", "I-PER", "B-LOC", "I-LOC"])
    features = Features({"tokens": ListOf(Value("string")), "ner_tags": ListOf(tags)})

    def split(sentences: list[str], size: int, rng: random.Random) -> Dataset:
        rows: list[dict] = []
        for _ in range(size):
            row: dict = {"tokens": [], "ner_tags": []}
            for word in rng.choice(sentences).split():
                kind = {"{person}": "PER", "{town}": "LOC"}.get(word)
                words = {"PER": [rng.choice(PEOPLE)], "LOC": rng.choice(towns).split()}.get(kind, [word])
                row["tokens"] += words
                row["ner_tags"] += ["O"] if kind is None else [f"B-{kind}", f"I-{kind}"][: len(words)]
            rows.append(row)
        return Dataset.from_list(rows, features=features)

    return {
        task: DatasetDict(
            train=split(sentences, 32 if task == "sports" else 160, random.Random(1)),
            validation=split(sentences, 60, random.Random(2)),
        )
        for task, sentences in templates.items()
    }


def facts() -> dict[str, DatasetDict]:
    """Questions about a sentence, answered by words of it; the student's sentences, of a harbour, are few.

    Returns:
        `{task: data}` in the form of SQuAD.
    """
    things = {
        "market": ("bought", ["bread", "apples", "cheese", "honey"]),
        "school": ("read", ["a poem", "a letter", "the map", "the news"]),
        "harbour": ("saw", ["a ship", "the whale", "two boats", "the storm"]),
    }
    places = ["the garden", "the old town", "the hall", "the kitchen"]
    days = ["monday", "friday", "sunday evening", "tuesday"]

    def split(verb: str, nouns: list[str], size: int, rng: random.Random) -> Dataset:
        rows = []
        for index in range(size):
            person, noun, place, day = (rng.choice(words) for words in (PEOPLE, nouns, places, days))
            context = f"On {day} {person} {verb} {noun} in {place} ."
            question, answer = [
                (f"Who {verb} {noun} ?", person), (f"What was it that {person} {verb} ?", noun),
                (f"Where was {person} ?", place), (f"When was {person} there ?", day),
            ][index % 4]  # fmt: skip
            answers = {"text": [answer], "answer_start": [context.index(answer)]}
            rows.append({"id": str(index), "question": question, "context": context, "answers": answers})
        return Dataset.from_list(rows)

    return {
        task: DatasetDict(
            train=split(verb, nouns, 48 if task == "harbour" else 320, random.Random(1)),
            validation=split(verb, nouns, 60, random.Random(2)),
        )
        for task, (verb, nouns) in things.items()
    }


def colours(column: str) -> dict[str, DatasetDict]:
    """Sentences that say which colour a fruit has, of three kinds; the student's kind, of a kitchen, has few.

    Args:
        column: The name of the text column.

    Returns:
        `{task: data}`, and under `"pretraining"` the same sentences with colours drawn at random.
    """
    fruits = dict(cherry="red", lemon="yellow", plum="blue", lime="green", peach="orange", grape="purple")
    fruits |= dict(tomato="red", banana="yellow", berry="blue", pea="green", carrot="orange", onion="purple")
    templates = {
        "shop": "in the {place} of the shop the {fruit} looks {colour} .",
        "farm": "{person} from the farm says that a {fruit} turns {colour} in {month} .",
        "kitchen": "{person} put a {fruit} on the {place} , it is {colour} .",
    }

    def split(kinds: Sequence[str], size: int, seed: int, right: bool = True) -> Dataset:
        rng, texts = random.Random(seed), []
        for _ in range(size):
            fruit = rng.choice(list(fruits))
            colour = fruits[fruit] if right else rng.choice(list(fruits.values()))
            words = {"fruit": fruit, "colour": colour, "place": rng.choice(["window", "table", "corner"])}
            words |= {"person": rng.choice(PEOPLE), "month": rng.choice(["may", "june", "july"])}
            texts.append(templates[rng.choice(kinds)].format(**words))
        return Dataset.from_dict({column: texts})

    tasks = {
        task: DatasetDict(train=split([task], 24 if task == "kitchen" else 240, 1), validation=split([task], 60, 2))
        for task in templates
    }
    return {**tasks, "pretraining": DatasetDict(train=split(list(templates), 600, 3, right=False))}


def chats(column: str) -> dict[str, DatasetDict]:
    """Chats of two turns about the colours of fruits, asked in three ways; the student's way has few of them.

    Args:
        column: The name of the column with the messages.

    Returns:
        `{task: data}`, and under `"pretraining"` the same chats with colours drawn at random.
    """
    fruits = dict(cherry="red", lemon="yellow", plum="blue", lime="green", peach="orange", grape="purple")
    questions = {
        "shop": "which colour has the {fruit} that you sell ?",
        "farm": "{person} asks what colour your {fruit} turns .",
        "kitchen": "i cut a {fruit} , what colour is it inside ?",
    }

    def split(kinds: Sequence[str], size: int, seed: int, right: bool = True) -> Dataset:
        rng, rows = random.Random(seed), []
        for _ in range(size):
            messages = []
            for fruit in rng.sample(list(fruits), 2):
                question = questions[rng.choice(kinds)].format(fruit=fruit, person=rng.choice(PEOPLE))
                colour = fruits[fruit] if right else rng.choice(list(fruits.values()))
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": f"the {fruit} is {colour} ."})
            rows.append({column: messages})
        return Dataset.from_list(rows)

    tasks = {
        task: DatasetDict(train=split([task], 16 if task == "kitchen" else 200, 1), validation=split([task], 40, 2))
        for task in questions
    }
    return {**tasks, "pretraining": DatasetDict(train=split(list(questions), 400, 3, right=False))}


def reports(text_column: str, summary_column: str) -> dict[str, DatasetDict]:
    """Make reports of three kinds, with one sentence as summary; the student's kind, of a garden, has few.

    Args:
        text_column: The name of the column with the report.
        summary_column: The name of the column with its summary.

    Returns:
        `{task: data}`, and under `"pretraining"` reports with their own words as summary.
    """
    things = {
        "harbour": ["boats", "nets", "fish", "ropes"],
        "school": ["books", "maps", "pens", "chairs"],
        "garden": ["seeds", "trees", "tools", "flowers"],
    }
    fillers = ["it was cold", "it rained", "the sun came out", "nobody was late", "all went home"]

    def split(kinds: Sequence[str], size: int, seed: int, copy: bool = False) -> Dataset:
        rng, rows = random.Random(seed), []
        for _ in range(size):
            kind = rng.choice(kinds)
            summary = f"{rng.choice(PEOPLE)} {rng.choice(['sold', 'found', 'lost'])} {rng.choice(things[kind])}"
            sentences = [rng.choice(fillers), f"in the {kind} {summary}"]
            rng.shuffle(sentences)
            text = " . ".join(sentences) + " ."
            rows.append({text_column: text, summary_column: text if copy else summary})
        return Dataset.from_list(rows)

    tasks = {
        task: DatasetDict(train=split([task], 32 if task == "garden" else 240, 1), validation=split([task], 40, 2))
        for task in things
    }
    return {**tasks, "pretraining": DatasetDict(train=split(list(things), 1000, 3, copy=True))}


def pictures(image_column: str, label_column: str) -> dict[str, DatasetDict]:
    """Noisy pictures with a bright square in one of four corners, on grounds of three colours; the student has few.

    Args:
        image_column: The name of the column with the picture.
        label_column: The name of the column with the corner.

    Returns:
        `{task: data}`, and under `"pretraining"` pictures of all grounds, whose squares are dark.
    """
    from PIL import Image as PILImage  # the other demos run without Pillow

    corners = {"top left": (2, 2), "top right": (2, 9), "bottom left": (9, 2), "bottom right": (9, 9)}
    grounds = {"grass": (40, 120, 40), "water": (40, 60, 140), "sand": (150, 120, 60)}
    features = Features({image_column: Image(), label_column: ClassLabel(names=list(corners))})

    def split(kinds: Sequence[str], size: int, seed: int, contrast: int = 70) -> Dataset:
        rng, rows = np.random.default_rng(seed), []
        for index in range(size):
            pixels = rng.normal(grounds[kinds[index // 4 % len(kinds)]], 10, size=(16, 16, 3))
            top, left = list(corners.values())[index % 4] + rng.integers(-1, 2, size=2)
            pixels[top : top + 5, left : left + 5] += contrast
            picture = PILImage.fromarray(pixels.clip(0, 255).astype("uint8"))
            rows.append({image_column: picture, label_column: index % 4})
        return Dataset.from_list(rows, features=features)

    tasks = {
        task: DatasetDict(train=split([task], 32 if task == "sand" else 240, 1), validation=split([task], 100, 2))
        for task in grounds
    }
    return {**tasks, "pretraining": DatasetDict(train=split(list(grounds), 480, 3, contrast=-70))}
