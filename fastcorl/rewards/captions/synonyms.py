"""Words that SPICE takes for the same, for the rule-based caption parser.

SPICE calls two words the same when WordNet lists them in one synset, in whatever sense. These are everyday words of
which that holds and which mean the same in a caption, and common misspellings. "man" and "guy", which WordNet keeps
apart, stay apart here.
"""

_SETS = """
    man, gentleman
    child, kid, youngster, baby, infant
    person, someone, somebody, individual
    couple, pair
    bunch, crowd
    bicycle, bike
    motorcycle, motorbike
    car, automobile, auto
    airplane, plane, aeroplane
    bus, coach
    taxi, cab
    sidewalk, pavement
    track, trail, rail
    tv, television
    couch, sofa
    stove, range
    refrigerator, refridgerator
    toilet, commode
    tub, bathtub, bath
    photo, picture, photograph, pic
    image, double
    rug, carpet
    trash, rubbish
    forest, woods, wood, woodland
    field, plain, area
    mountain, mount
    rock, stone
    ocean, sea
    pool, pond
    shore, land
    donut, doughnut
    hotdog, frank, frankfurter
    hamburger, burger
    puppy, pup
    kitten, kitty
    racket, racquet, raquet
    frisbee, frizbee
    skier, skiier
    t-shirt, tshirt, tee-shirt
    glasses, spectacles, eyeglasses
    sunglasses, shades
    purse, bag
    building, edifice
    house, home
    store, shop
    dock, pier
    door, doorway
    stair, step
    middle, center, centre
    vegetable, veggie
    soda, pop
    meal, repast
    drink, beverage
    dress, clothes
    big, large
    small, little
    gray, grey
    golden, gold
    colorful, colourful
    blonde, blond
    happy, glad
    filthy, dirty
    new, modern
    quick, fast
    various, several
    under, below
    eat, consume
    hold, carry, grip
    throw, hurl
    jump, leap
    run, race
    talk, speak
    sleep, nap
    prepare, make
    close, shut
    show, display
    look, appear
    do, perform
    have, own
"""
SYNONYMS: dict[str, str] = {}
for _line in _SETS.strip().splitlines():
    _first, *_others = (word.strip() for word in _line.split(","))
    SYNONYMS.update(dict.fromkeys(_others, _first))
