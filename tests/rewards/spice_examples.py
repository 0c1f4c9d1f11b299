"""Pairs of captions with the tuples that SPICE's published rules make of their dependency trees, read by hand, and the
score that the classes of spice-1.0.jar give these tuples (merging and WordNet included; 2026-11-24)."""

from typing import NamedTuple


class Example(NamedTuple):
    reference: str
    reference_tuples: str  # "object;object,attribute;object,relation,object"
    candidate: str
    candidate_tuples: str
    score: float


EXAMPLES = [
    Example(
        "Two brown dogs are running through the snow.",
        "dog;dog,brown;dog,two;snow;dog,run through,snow",
        "A brown dog runs in the snow.",
        "dog;dog,brown;snow;dog,run in,snow",
        0.666667,
    ),
    Example(
        "A man wearing a red shirt and a hat holds a bicycle.",
        "man;shirt;shirt,red;hat;bicycle;man,wear,shirt;man,wear,hat;man,hold,bicycle",
        "A man in a red shirt is carrying a bike.",
        "man;shirt;shirt,red;bike;man,in,shirt;man,carry,bike",
        0.714286,
    ),
    Example(
        "The cat's tail is white.",
        "cat;tail;cat,have,tail;tail,white",
        "a cat with a white tail",
        "cat;tail;tail,white;cat,with,tail",
        0.75,
    ),
    Example(
        "A plate of food is on the wooden table.",
        "plate;food;plate,of,food;table;table,wooden;plate,on,table",
        "There is a plate of rice and beans on a table.",
        "plate;rice;bean;plate,of,rice;plate,of,bean;table;plate,on,table",
        0.461538,
    ),
    Example("A woman is smiling.", "woman;woman,smile", "a smiling woman", "woman;woman,smile", 1.0),
    Example(
        "A ball is thrown by a boy.",
        "ball;boy;boy,throw,ball",
        "A boy throws a ball to his dog.",
        "boy;ball;dog;boy,throw,ball;boy,throw to,dog;boy,have,dog",
        0.666667,
    ),
    Example(
        "A man who is riding a horse is waving.",
        "man;horse;man,ride,horse;man,wave",
        "A man rides a white horse.",
        "man;horse;horse,white;man,ride,horse",
        0.75,
    ),
    Example(
        "A couple of black and white cows are grazing in a field next to a barn.",
        "couple;cow;cow,black;cow,white;cow,a;cow,graze in,field;field;barn;field,next to,barn",
        "cows in a green field",
        "cow;field;field,green;cow,in,field",
        0.307692,
    ),
    Example(
        "Three large buses parked in front of a building.",
        "bus;bus,three;bus,large;building;front;bus,park in front of,building",
        "Several big buses are parked by a tall building.",
        "bus;bus,several;bus,big;building;building,tall;building,park,bus",
        0.5,
    ),
    Example(
        "A skateboarder does a trick while people watch.",
        "skateboarder;trick;skateboarder,do,trick;people;people,watch",
        "A boy jumps over a ramp on his skateboard.",
        "boy;ramp;skateboard;boy,jump over,ramp;boy,jump on,skateboard;boy,have,skateboard",
        0.181818,
    ),
    Example(
        "a kitchen with a stove, a sink and a white refrigerator",
        "kitchen;stove;sink;refrigerator;refrigerator,white;kitchen,with,stove;kitchen,with,sink;kitchen,with,refrigerator",
        "A clean kitchen has an oven and a fridge.",
        "kitchen;kitchen,clean;oven;fridge;kitchen,have,oven;kitchen,have,fridge",
        0.142857,
    ),
    Example(
        "A street sign hangs from a metal pole.",
        "sign;sign,street;pole;pole,metal;sign,hang from,pole",
        "A green sign is attached to a pole.",
        "sign;sign,green;pole",
        0.5,
    ),
]
