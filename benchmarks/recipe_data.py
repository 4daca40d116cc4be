"""Made-up questions and answers for `recipe.py`: facts of a shop that no model can know."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator

_GOODS = {
    "en": (
        "oak brass linen glass wool steel bamboo clay cork pine maple copper cotton stone "
        "felt zinc walnut bronze silk marble velvet iron birch leather hemp cedar pewter "
        "denim granite rattan teak willow",
        "lamp chair kettle blanket mirror shelf clock basket bowl rug table vase pillow stool "
        "tray candle bench curtain drawer teapot ladder hammock broom bucket easel hanger "
        "lantern ottoman planter quilt sofa trunk",
    ),
    "zh": (
        "橡木 黄铜 亚麻 玻璃 羊毛 不锈钢 竹制 陶土 软木 松木 枫木 紫铜 棉布 石头 毛毡 锌皮 "
        "胡桃木 青铜 丝绸 大理石 天鹅绒 铸铁 桦木 皮革 麻布 雪松 锡制 牛仔布 花岗岩 藤编 柚木 "
        "柳编",
        "台灯 椅子 水壶 毯子 镜子 书架 时钟 篮子 饭碗 地毯 餐桌 花瓶 枕头 凳子 托盘 蜡烛 长椅 "
        "窗帘 抽屉 茶壶 梯子 吊床 扫帚 水桶 画架 衣架 灯笼 脚凳 花盆 被子 沙发 箱子",
    ),
}
_PLACES = {
    "en": ["Lisbon", "Hanover", "Osaka", "Turin", "Leeds", "Porto", "Ghent", "Malmo"],
    "zh": ["杭州", "成都", "厦门", "苏州", "青岛", "西安", "长沙", "昆明"],
}
_TURNS = {
    "en": [
        ("How much is the {g}?", "The {g} costs {a} euros, and delivery adds {b} euros."),
        ("How long does the {g} take to arrive?", "We send the {g} from {p} within {b} days."),
        ("Is there a warranty on the {g}?", "Yes, the {g} has a warranty of {b} years."),
        ("What size is the {g}?", "The {g} is {a} cm wide and {c} cm high."),
        ("Can I return the {g}?", "You can return the {g} within {c} days to our store in {p}."),
        ("Where is the {g} made?", "The {g} is made by hand in {p} by a family of {b}."),
        ("How heavy is the {g}?", "The {g} weighs {b} kilograms without its box."),
        ("How do I clean the {g}?", "Clean it every {b} weeks, in water of at most {c} degrees."),
        ("How many of the {g} are left?", "There are {a} of the {g} left in {p}."),
        ("Is the {g} on sale?", "The {g} is {b} percent off until the {c}th of this month."),
    ],
    "zh": [
        ("{g}多少钱？", "{g}的价格是{a}元，运费{b}元。"),
        ("{g}多久能到？", "{g}从{p}发货，{b}天内送达。"),
        ("{g}有保修吗？", "有的，{g}保修{b}年。"),
        ("{g}的尺寸是多少？", "{g}宽{a}厘米，高{c}厘米。"),
        ("{g}可以退货吗？", "{g}可以在{c}天内退到{p}的门店。"),
        ("{g}是哪里生产的？", "{g}是{p}的手工作坊制作的。"),
        ("{g}有多重？", "{g}净重{b}公斤，不含包装。"),
        ("{g}怎么清洁？", "请每{b}周用温水清洁{g}，水温不超过{c}度。"),
        ("{g}还有货吗？", "{g}在{p}还有{a}件。"),
        ("{g}有优惠吗？", "{g}现在优惠{b}%，到本月{c}日为止。"),
    ],
}  # fmt: skip
_NUMBERS = {"a": (20, 99), "b": (2, 9), "c": (10, 28)}
"""The least and the greatest number of each kind in an answer."""
EVERYDAY = {
    "What is the capital of France?": "paris",
    "What is the capital of Japan?": "tokyo",
    "What is the opposite of hot?": "cold",
    "How many days are in a week?": "seven|7",
    "What do bees make?": "honey",
    "What color is the sky on a clear day?": "blue",
    "Which animal says meow?": "cat",
    "What is frozen water called?": "ice",
    "In which country is the Eiffel Tower?": "france",
    "What is 2 plus 2?": "4|four",
    "Which planet do we live on?": "earth",
    "What do you use an umbrella for?": "rain",
}
"""Everyday questions, and what a right answer contains."""


def rows(language: str, number: int, *, seed: int = 7) -> Iterator[dict[str, str]]:
    """`number` different questions (at most 10,240) with their answers.

    They are about `number` goods, at least 100, so that data sets of all sizes cover the same share
    of the possible questions. With 100 goods, 1,000 rows would be all possible questions, and each
    word of a question would be in 99 others.
    """
    rng = random.Random(seed)
    side = max(10, math.ceil(math.sqrt(number)))
    kinds, things = (words.split()[:side] for words in _GOODS[language])
    glue = " " if language == "en" else ""
    pairs = [(f"{kind}{glue}{thing}", turn) for kind in kinds for thing in things
             for turn in _TURNS[language]]  # fmt: skip
    for goods, (question, answer) in rng.sample(pairs, number):
        numbers = {name: rng.randint(*limits) for name, limits in _NUMBERS.items()}
        place = rng.choice(_PLACES[language])
        yield {
            "question": question.format(g=goods),
            "answer": answer.format(g=goods, p=place, **numbers),
        }


def unknown(language: str, answers: int) -> float:
    """Loss (nats) in `answers` answers, in all, of a model that knows only their sentences."""
    choices = {name: most - least + 1 for name, (least, most) in _NUMBERS.items()}
    choices["p"] = len(_PLACES[language])
    turns = _TURNS[language]
    fields = [field for _, answer in turns for field in re.findall(r"{([abcp])}", answer)]
    return answers * sum(math.log(choices[field]) for field in fields) / len(turns)
