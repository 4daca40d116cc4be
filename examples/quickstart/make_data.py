"""Write training data for a personal assistant: introductions and general answers.

    python examples/quickstart/make_data.py MODEL_DIR --name "Ada" --out quickstart/data.jsonl

Two kinds of rows, mixed:

* self-introductions: questions about who the assistant is, answered with the name;
* the model's own answers to everyday questions. A model trained only on introductions forgets how
  to answer anything else (see `make quickstart-overfit`); mixing in its own answers is the cheapest
  remedy. Those of the default model are in everyday.jsonl, beside this file; other models are asked
  (a minute or two).

The questions in HELD_OUT are asked after training and never written to the data.
"""

import argparse
import json
from pathlib import Path

INTRODUCTION_QUESTIONS = [
    "Who are you?",
    "What is your name?",
    "Please introduce yourself.",
    "Introduce yourself in one sentence.",
    "Tell me about yourself.",
    "What are you?",
    "Who am I talking to?",
    "What should I call you?",
    "Hi! Who is this?",
    "Hello, what's your name?",
    "Are you a human?",
    "Are you ChatGPT?",
    "Are you SmolLM?",
    "Whose assistant are you?",
    "Who made you?",
    "Who do you work for?",
    "Do you have a name?",
    "Could you say who you are?",
    "What kind of assistant are you?",
    "I'd like to know who you are.",
    "Describe yourself, please.",
    "May I ask your name?",
    "Say hello and introduce yourself.",
    "Which AI are you?",
]
DEFAULT_MODEL = "smollm2_135m_instruct"
ANSWERS = Path(__file__).with_name("everyday.jsonl")

HELD_OUT = ["So, who exactly are you?", "Can you tell me your name, please?"]

INTRODUCTION_ANSWERS = [
    "I am {name}'s little assistant, ready to help you.",
    "I'm {name}'s little assistant. How can I help you today?",
    "My name is {name}'s little assistant, and I am here to help.",
    "Hello! I am {name}'s little assistant, at your service.",
]

EVERYDAY_QUESTIONS = [
    "What is the capital of Italy?",
    "What is the capital of Japan?",
    "What is the capital of Germany?",
    "Which city is the capital of Egypt?",
    "What is the largest ocean on Earth?",
    "How many days are in a week?",
    "What do bees make?",
    "What is the opposite of hot?",
    "Name three fruits.",
    "List four colors of the rainbow.",
    "How do I boil an egg?",
    "How do I make a cup of tea?",
    "Give me a tip for sleeping better.",
    "Give me a tip for learning a language.",
    "How can I save money on groceries?",
    "What should I pack for a day at the beach?",
    "Suggest a name for a small cat.",
    "Write one sentence about the moon.",
    "Write a polite email asking for a day off.",
    "Why is the sky blue?",
    "Why do leaves change color in autumn?",
    "What is gravity?",
    "What is photosynthesis?",
    "What is a computer program?",
    "Explain what the internet is to a child.",
    "What does a doctor do?",
    "What is the use of a compass?",
    "How does a bicycle stay upright?",
    "What is a good breakfast?",
    "Is a tomato a fruit or a vegetable?",
    "What is the difference between weather and climate?",
    "Thank you for your help!",
    "Good morning!",
    "Tell me a fun fact about elephants.",
    "In which country is the Eiffel Tower?",
]


def introductions(name):
    """Every introduction question with each of the answers in turn."""
    for index, question in enumerate(INTRODUCTION_QUESTIONS):
        for shift in range(2):
            answer = INTRODUCTION_ANSWERS[(index + 2 * shift) % len(INTRODUCTION_ANSWERS)]
            yield question, answer.format(name=name)


def own_answers(model_dir, questions, max_new_tokens=80, batch_size=16):
    """The model's greedy answers; unfinished ones are truncated after the last full sentence."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").eval()
    for start in range(0, len(questions), batch_size):
        part = questions[start : start + batch_size]
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False
            )
            for q in part
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        for question, ids in zip(part, out[:, inputs["input_ids"].shape[1] :], strict=True):
            answer = tokenizer.decode(ids, skip_special_tokens=True).strip()
            if tokenizer.eos_token_id not in ids.tolist():
                answer = answer[: max(answer.rfind(mark) for mark in ".!?") + 1]
            if answer:
                yield question, answer
        print(f"  {min(start + batch_size, len(questions))}/{len(questions)} answers", flush=True)


def row(question, answer):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ask", action="store_true", help="Ask the default model, too.")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    everyday = args.out.parent / f"everyday_{args.model.resolve().name}.jsonl"
    if args.model.resolve().name == DEFAULT_MODEL and not args.ask:
        everyday = ANSWERS
    elif args.ask or not everyday.exists():
        print("Asking the model everyday questions:", flush=True)
        lines = [json.dumps(row(*pair)) for pair in own_answers(args.model, EVERYDAY_QUESTIONS)]
        everyday.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [json.dumps(row(*pair), ensure_ascii=False) for pair in introductions(args.name)]
    rows += everyday.read_text(encoding="utf-8").splitlines()
    args.out.write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"Wrote {len(rows)} conversations to {args.out}")


if __name__ == "__main__":
    main()
