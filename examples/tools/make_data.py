"""Write conversations with tool calls: for training, and requests to measure afterwards.

    python examples/tools/make_data.py --out quickstart-tools

Every request is made of a phrase and values. train.jsonl calls the tools of TOOLS; seen.jsonl asks
for the same tools with other phrases and values; held_out.jsonl asks for the tools of HELD_OUT,
which training never shows. One conversation in six needs no call, and one in four asks for two
tools.
"""

import argparse
import json
import random
from pathlib import Path

TRAINED_VALUES = {
    "city": "Paris Rome Tokyo Cairo Lima Oslo Berlin Madrid Delhi Boston Seoul Vienna".split(),
    "person": "Anna Tom Maria Ben Julia Omar Lena Paul".split(),
    "word": "river friend garden winter bread music window school".split(),
    "language": "French German Spanish Italian Chinese".split(),
    "song": ["Yesterday", "Imagine", "Hey Jude", "Let It Be", "Blue Moon"],
    "file": ["notes.txt", "report.pdf", "list.csv", "photo.png"],
    "room": "kitchen bedroom garage bathroom office".split(),
    "team": "Lakers Arsenal Bulls Juventus Yankees".split(),
    "animal": "dog cat horse owl whale".split(),
    "currency": "USD EUR GBP JPY".split(),
    "dish": "lasagna curry pancakes sushi".split(),
    "title": ["Dune", "Emma", "Ulysses", "Dracula"],
}
NEW_VALUES = {
    "city": "Dublin Prague Nairobi Lisbon Athens Helsinki".split(),
    "person": "Clara Hugo Nina Felix".split(),
    "word": "mountain candle ocean shadow".split(),
    "language": "Polish Greek Dutch".split(),
    "song": ["Thriller", "Wonderwall", "Moon River"],
    "file": ["plan.txt", "budget.xlsx", "map.png"],
    "room": "hallway basement attic".split(),
    "team": "Celtics Chelsea Mets".split(),
    "animal": "tiger eagle rabbit".split(),
    "currency": "CHF CAD AUD".split(),
    "dish": "paella ramen goulash".split(),
    "title": ["Frankenstein", "Walden", "Middlemarch"],
}
# name: description, parameters, phrases (the last one is only asked after training), result, answer
TOOLS = {
    "calculator": (
        "Calculate the value of an arithmetic expression.",
        {"expression": ("string", "The expression, such as (3 + 4) * 2.")},
        [],
        "{value}",
        "{question} is {value}.",
    ),
    "get_weather": (
        "Get the weather of a city.",
        {"city": ("string", "The city.")},
        [
            "What is the weather in {city}?",
            "Is it raining in {city}?",
            "How warm is it in {city}?",
            "Tell me the weather in {city}.",
            "Do I need an umbrella in {city} today?",
        ],
        "sunny, {number} degrees",
        "In {city} it is sunny, with {number} degrees.",
    ),
    "set_timer": (
        "Start a timer.",
        {"minutes": ("integer", "How many minutes.")},
        [
            "Set a timer for {number} minutes.",
            "Start a {number} minute timer.",
            "Remind me in {number} minutes.",
            "Please count down {number} minutes for me.",
        ],
        "started",
        "The timer runs for {number} minutes.",
    ),
    "translate": (
        "Translate a word.",
        {"word": ("string", "The word."), "language": ("string", "The language.")},
        [
            "Translate {word} to {language}.",
            "What is {word} in {language}?",
            "How do you say {word} in {language}?",
            "I need the {language} word for {word}.",
        ],
        "done",
        "I translated {word} to {language}.",
    ),
    "play_song": (
        "Play a song.",
        {"song": ("string", "The title.")},
        [
            "Play {song}.",
            "I want to hear {song}.",
            "Put on {song}, please.",
            "Can you play the song {song}?",
        ],
        "playing",
        "Now playing {song}.",
    ),
    "send_message": (
        "Send a message to a person.",
        {"person": ("string", "Who gets it."), "text": ("string", "The message.")},
        [
            "Tell {person} that I am late.|I am late",
            "Write to {person}: see you soon.|see you soon",
            "Send {person} a message: call me.|call me",
            "Let {person} know that dinner is ready.|dinner is ready",
        ],
        "sent",
        "I sent the message to {person}.",
    ),
    "open_file": (
        "Open a file.",
        {"file": ("string", "The name of the file.")},
        [
            "Open {file}.",
            "Show me {file}.",
            "Please open the file {file}.",
            "I want to see {file}.",
        ],
        "opened",
        "{file} is open.",
    ),
    "set_light": (
        "Switch the light of a room.",
        {"room": ("string", "The room."), "on": ("boolean", "Whether it is on.")},
        [
            "Turn on the light in the {room}.|true",
            "Turn off the {room} light.|false",
            "Switch the light in the {room} off.|false",
            "Make it bright in the {room}.|true",
        ],
        "ok",
        "The light in the {room} is set.",
    ),
    "get_score": (
        "Get the last score of a team.",
        {"team": ("string", "The team.")},
        [
            "How did the {team} play?",
            "What was the score of the {team}?",
            "Did the {team} win?",
            "Give me the latest {team} result.",
        ],
        "they won",
        "The {team} won.",
    ),
    "animal_fact": (
        "Get a fact about an animal.",
        {"animal": ("string", "The animal.")},
        [
            "Tell me a fact about the {animal}.",
            "What should I know about a {animal}?",
            "Give me a {animal} fact.",
            "Something interesting about the {animal}, please.",
        ],
        "It is an animal.",
        "Here is a fact about the {animal}: it is an animal.",
    ),
    "convert_money": (
        "Convert an amount of money.",
        {"amount": ("integer", "The amount."), "currency": ("string", "The currency wanted.")},
        [
            "How much is {number} dollars in {currency}?",
            "Convert {number} dollars to {currency}.",
            "Change {number} dollars into {currency}.",
            "I have {number} dollars. What is that in {currency}?",
        ],
        "done",
        "I converted {number} dollars to {currency}.",
    ),
    "add_to_list": (
        "Add an item to the shopping list.",
        {"item": ("string", "The item.")},
        [
            "Add {word} to my shopping list.",
            "Put {word} on the list.",
            "I need to buy {word}.",
            "Remember {word} for my shopping.",
        ],
        "added",
        "I added {word} to the list.",
    ),
    "book_flight": (
        "Book a flight.",
        {"origin": ("string", "Where it starts."), "destination": ("string", "Where it goes.")},
        [
            "Book a flight from {city} to {city2}.",
            "I want to fly from {city} to {city2}.",
            "Get me a plane from {city} to {city2}.",
            "Please find a flight to {city2} from {city}.",
        ],
        "booked",
        "The flight from {city} to {city2} is booked.",
    ),
}
HELD_OUT = {
    "find_recipe": (
        "Find a recipe for a dish.",
        {"dish": ("string", "The dish.")},
        ["Find a recipe for {dish}.", "How do I cook {dish}?", "I want to make {dish}."],
    ),
    "get_time": (
        "Get the local time of a city.",
        {"city": ("string", "The city.")},
        ["What time is it in {city}?", "Tell me the local time in {city}.",
         "How late is it in {city} now?"],
    ),
    "find_book": (
        "Look up a book in the library.",
        {"title": ("string", "The title of the book.")},
        ["Is the book {title} in the library?", "Look up {title} in the library.",
         "Do you have the book {title}?"],
    ),
    "call_person": (
        "Call a person on the phone.",
        {"person": ("string", "Who is called.")},
        ["Call {person}.", "Give {person} a ring.", "I want to talk to {person} on the phone."],
    ),
    "set_alarm": (
        "Set an alarm.",
        {"hour": ("integer", "The hour, from 0 to 23.")},
        ["Wake me at {hour} o'clock.", "Set an alarm for {hour} o'clock.",
         "I have to get up at {hour}."],
    ),
}  # fmt: skip
SMALL_TALK = [
    ("Hello!", "Hello! How can I help you?"),
    ("Thank you!", "You're welcome!"),
    ("Good morning.", "Good morning! What can I do for you?"),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet."),
    ("How many days are in a week?", "A week has seven days."),
    ("What color is the sky?", "The sky is blue."),
    ("Are you a robot?", "I am an assistant, a computer program."),
    ("What do bees make?", "Bees make honey."),
    ("Tell me a joke.", "Why did the chicken cross the road? To get to the other side."),
]
NEW_SMALL_TALK = [
    ("Hi there!", ""), ("What is the capital of Italy?", ""), ("Who painted the Mona Lisa?", ""),
    ("How many months are in a year?", ""), ("Thanks a lot!", ""), ("What color is grass?", ""),
]  # fmt: skip
SIGNS = {"plus": "+", "minus": "-", "times": "*", "divided by": "/"}


def schema(name, description, parameters):
    properties = {
        key: {"type": kind, "description": words} for key, (kind, words) in parameters.items()
    }
    inner = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": name, "description": description, "parameters": inner}
    return {"type": "function", "function": function}


SCHEMAS = {name: schema(name, *row[:2]) for name, row in (TOOLS | HELD_OUT).items()}


def arithmetic(rng, new):
    sign = rng.choice(["plus", "minus", "times"])
    one, other = rng.randint(2, 99), rng.randint(2, 99)
    while (one, other) == (37, 49):  # asked at the end
        other = rng.randint(2, 99)
    if sign == "minus":
        one, other = max(one, other), min(one, other)
    phrases = [f"What is {one} {sign} {other}?", f"How much is {one} {sign} {other}?",
               f"Calculate {one} {sign} {other}.", f"{one} {sign} {other} = ?"]  # fmt: skip
    text = f"Can you work out {one} {sign} {other}?" if new else rng.choice(phrases)
    expression = f"{one} {SIGNS[sign]} {other}"
    return text, {"expression": expression}, str(eval(expression)), f"{one} {sign} {other}"


def request(rng, name, new):
    """A request for the tool `name`, its arguments, the result and the answer."""
    values = NEW_VALUES if new else TRAINED_VALUES
    row = (TOOLS | HELD_OUT)[name]
    if name == "calculator":
        text, arguments, value, question = arithmetic(rng, new)
        return text, arguments, value, f"{question} is {value}."
    filled = {key: rng.choice(options) for key, options in values.items()}
    filled["city2"] = rng.choice([c for c in values["city"] if c != filled["city"]])
    filled["number"], filled["hour"] = rng.randint(2, 60), rng.randint(5, 22)
    phrases = row[2]
    if name in TOOLS:
        phrases = phrases[-1:] if new else phrases[:-1]
    phrase, _, extra = rng.choice(phrases).partition("|")
    sources = {
        "item": "word", "minutes": "number", "amount": "number", "origin": "city",
        "destination": "city2",
    }  # fmt: skip
    arguments = {}
    for key in row[1]:
        if key == "text":
            arguments[key] = extra
        elif key == "on":
            arguments[key] = extra == "true"
        else:
            arguments[key] = filled[sources.get(key, key)]
    result, answer = (row[3], row[4]) if name in TOOLS else ("", "")
    return phrase.format(**filled), arguments, result.format(**filled), answer.format(**filled)


def shown(rng, wanted, among):
    """The tools and up to two others, in random order; one or two others if none is needed."""
    count = rng.choice([0, 1, 1, 2]) if wanted else rng.choice([1, 2])
    names = [*wanted, *rng.sample([n for n in among if n not in wanted], count)]
    rng.shuffle(names)
    return [SCHEMAS[n] for n in names]


def conversation(rng, names, *, new=False, among=TOOLS):
    """A conversation with a request for each of the tools `names`."""
    messages = []
    for name in names:
        text, arguments, result, answer = request(rng, name, new)
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        if answer:
            messages.append({"role": "tool", "content": result})
            messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, "tools": shown(rng, names, among)}


def small_talk(rng, pair, among=TOOLS):
    question, answer = pair
    messages = [{"role": "user", "content": question}]
    messages.append({"role": "assistant", "content": answer or "(any answer without a call)"})
    return {"messages": messages, "tools": shown(rng, [], among)}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"Wrote {len(rows)} conversations to {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=180)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    names = list(TOOLS)
    rows = []
    for number in range(args.rows):
        if number % 6 == 5:
            rows.append(small_talk(rng, SMALL_TALK[number // 6 % len(SMALL_TALK)]))
        else:
            common = rng.random() < 0.15  # arithmetic has the most different requests
            first = "calculator" if common else names[number % len(names)]
            second = [n for n in rng.sample(names, 1) if n != first and rng.random() < 0.3]
            rows.append(conversation(rng, [first, *second]))
    write(args.out / "train.jsonl", rows)
    seen = [conversation(rng, [name], new=True) for name in names for _ in range(2)]
    write(args.out / "seen.jsonl", seen + [small_talk(rng, pair) for pair in NEW_SMALL_TALK])
    among = [*HELD_OUT, *names]
    held = [conversation(rng, [n], new=True, among=among) for n in HELD_OUT for _ in range(4)]
    write(args.out / "held_out.jsonl", held)


if __name__ == "__main__":
    main()
