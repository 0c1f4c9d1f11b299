"""Words of image captions by class, for the rule-based caption parser; no dictionary or tagger is needed.

What stands in none of these lists is a noun, which is what most unknown words in a caption are.
"""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DETERMINERS = _words("a an the this these those each every any some no both all either neither another")
POSSESSIVES = _words("his her its their my your our whose")
PRONOUNS = _words(
    "he she it they him them himself herself itself themselves i me we us you itself what nothing everything"
)
SINGULAR_PRONOUNS = _words("he she it him her his its himself herself itself my me i")
PERSONAL = SINGULAR_PRONOUNS | _words("they them their themselves we us our you your")
RELATIVES = _words("who that which whom")
CONJUNCTIONS = _words("and or & nor")
SUBORDINATORS = _words("while as when where because since if so but although though until whilst after before")
BE = _words("is are was were be been being am")
HAVE = _words("has have had having")
AUXILIARIES = _words("do does did can could will would may might must should cannot")
_DIGITS = {0: "zero", 1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}
_TENS = _words("ten eleven twelve thirteen fourteen fifteen sixteen twenty thirty forty fifty hundred dozen thousand")
NUMBERS = {word: word for word in (*_DIGITS.values(), *_TENS)}
NUMBERS |= {str(value): word for value, word in (_DIGITS | {10: "ten", 11: "eleven", 12: "twelve"}).items()}
PREPOSITIONS = _words(
    "in on of with at by for from near over under behind beside besides between among amongst amid amidst into onto "
    "through across around along against towards toward down up off above below beneath underneath inside outside "
    "during without within like past atop alongside about upon aboard throughout beyond opposite out via than "
    "surrounding including per despite"
)
LONG_PREPOSITIONS = frozenset(
    {
        ("in", "front", "of"),
        ("on", "top", "of"),
        ("as", "part", "of"),
        ("next", "to"),
        ("close", "to"),
        ("near", "to"),
        ("out", "of"),
        ("inside", "of"),
        ("outside", "of"),
        ("off", "of"),
        ("because", "of"),
        ("instead", "of"),
        ("along", "with"),
        ("together", "with"),
        ("across", "from"),
        ("far", "from"),
        ("such", "as"),
    }
)
LONG_PREPOSITION_TEXTS = frozenset(map(" ".join, LONG_PREPOSITIONS))
PARTICLES = _words("up down out off over away back together around along by about through")
ADVERBS = _words(
    "very not just also together away back there here outdoors indoors upside too still almost nearby downhill uphill "
    "sideways forward forwards backwards backward overhead ahead only now then already really quite apart "
    "underwater downtown upwards alone somewhere once twice about even inside-out ashore abroad again "
    "barely downstairs upstairs well soon ever never yet else"
)
# "a couple of dogs" speaks of dogs: nouns that only measure, and words that do so without an article
MEASURES = _words(
    "lot couple bunch number assortment variety handful series pair dozen array range kind type sort form bit ton heap "
    "plethora multitude string"
)
PLURAL_MEASURES = _words("lots plenty dozens tons loads hundreds thousands many several pairs some all both")

# adjectives that are nouns at the end of a noun phrase: "an orange"
ALSO_NOUNS = _words(
    "orange light glass metal front top bottom left right middle side center square concrete plastic male female adult "
    "teenage close double native upright public triangle gold silver tan cream violet navy lime plaid floral chinese "
    "military whole half few first second third good open dark professional oval"
)
# past forms that are more often a finite verb than a participle
PAST_ONLY = _words("ate took wore drove rode flew threw stood sat gave fell went ran swam came got slept")
NEVER_FINITE = _words("board face house cage leave group trade position fry")
LY_WORDS = _words("fly family belly jelly lily bully ally rally butterfly dolly trolley assembly supply")

COLOURS = _words(
    "black brown blue red yellow pink gray green white cream orange purple maroon beige violet tan gold golden silver "
    "turquoise teal blonde blond dark light bright colorful lime navy pale"
)
ADJECTIVES = COLOURS | _words("""
    able adjacent adorable adult aerial african airborne ajar alive alone american ancient angry antique artificial
    asian asleep athletic available awake aware bad bald bare barefoot barren bearded beautiful bent best better big
    big-eyed bitter black-and-white blank blue-eyed blurry bored bottom brave brightly-colored british bushy busy
    calm casual central certain checkered cheesy chinese choppy christmas chubby circular clean clear close close-up
    closed cloudy cluttered cold colourful comfortable commercial common concrete cool cozy creamy crispy crooked
    crowded curious curly cute dangerous dead decorated decorative deep delicious dense desolate different dim dirty
    disabled distant domestic double double-decker dressy drunk dry dull dusty early elderly electric electrical
    electronic elegant empty enormous entire european excited extra fake famous fancy fast fat female few final
    first flat floral fluffy foggy folded foreign formal free french fresh fried front frozen full funny furry
    gentle german giant gigantic golden-brown good gooey gorgeous gourmet grand grassy greasy great green hairy half
    handsome happy hard healthy heavy high hilly historic hollow homemade horizontal hot huge hungry icy ill indian
    indoor industrial interesting international italian japanese juicy kind large last late lazy leafy left leftover
    lit little live local lone long long-haired loose loud lovely low lower lush made-up main male many massive mean
    mechanical messy metallic mexican mid-air middle middle-aged military mini miniature modern more most
    mountainous muddy multi-colored multicolored multiple muscular naked narrow national native nearby neat nervous
    new next nice nude numerous odd old old-fashioned opaque open oriental ornamental ornate other outdoor oval
    overcast own parallel picturesque plaid plain plastic playful polar popular pregnant pretty professional proud
    public quiet rainy rare raw ready real rear rectangular reflective remote residential right ripe rocky rotten
    rough round rowdy rural rusty sad safe salty same sandy scared scenic scruffy second serious several sexy shady
    shaggy shallow sharp shiny shirtless short shy sick silly similar simple single skinny sleek sleepy slender slim
    slow small smooth snow-covered snowy soft soggy solid solitary sour sparse special spherical spicy spotted
    square stainless stationary steep stormy straight strange striped strong stuffed sturdy stylish suburban such
    sunlit sunny sweet tall tart tasty tattooed teenage thick thin third thirsty tidy tight tiny tired top
    traditional translucent transparent tree-lined triangular triple tropical twin typical ugly unable unlit unmade
    unusual upper upright upside-down urban vacant various vegetarian vertical vintage visible warm wavy weak weird
    well-dressed wet whole wide wild windy wintry wooded wooden worst young youthful
    """)

# lemmas; a word that is far more often a noun when it has no -ing or -ed is in NOUN_FIRST as well
VERBS = _words("""
    abandon accept accompany add adjust admire adorn advertise age aim alter anchor animate appear applaud approach
    arch arrange arrive ascend ask assemble attach attack attempt attend await back bake balance bargain bark bat
    bathe bear begin bend bite blindfold blink block bloom blow board boat boil bounce bow bowl box break bring
    browse brush buck buckle build bundle burn bury buy cage call camp canoe capture carpet carry carve cast catch
    celebrate chain change charge chase chat check cheer chew choose chop chuck clap climb close clothe clutter
    coach coat collect color comb combine come commute compare compete complete compose concentrate congregate
    connect consist construct contain contemplate contort control converge converse cook count cover crack cradle
    craft cramp crash crawl create cross crouch crowd cruise cry cuddle cup curl curve cut cycle damage dance dangle
    dart dash deal deck decorate defend deliver demolish demonstrate depart depict descend design destroy devour dig
    dine dip direct discard discover disembark display dive divide do dock dodge dot drag drape draw dress dribble
    drink drip drive drop dry duck duel dump dunk eat elevate embark embed embrace emerge encircle enclose engage
    enjoy enter entertain equip erect examine exhale expire explore expose extend face fade fall fasten feature feed
    feel fence fetch fight fill film find finish fire fish fit fix flank flavor flex fling flip float flood flow
    flower flush fly focus fold follow forage forest frame freeze frolic frost frown fry fumble furnish gallop
    gamble gather gaze gesture get giggle give glance glare glaze glide glow gnaw go grab grapple graze greet grill
    grimace grin grind grip groom group grow growl guide gulp hand handle hang haul have head hear heave help herd
    hide hike hit hitch hitchhike hoist hold hollow hood hook hop horn house hover howl huddle hug hunch hunt hurdle
    hurl ice illuminate impersonate include indicate inflate inhale injure inspect install instruct interact
    intersect investigate invite iron jet jog jostle juggle jump kayak keep kick kiss kneel knit knock know label
    land laugh launch lay layer lead lean leap learn leave let lick lie lift light line link listen litter live load
    locate lock look loom lose lounge lunge maintain make maneuver march mark marry mash match measure meet melt
    milk mill miss mix moo moor mope motor mount move mow munch name nap navigate need nibble nod number nurse
    nuzzle obscure observe occupy offer open oppose order organize overflow overgrow overlook overshadow overturn
    pack paddle paint pan panel park pass pave pay peck pedal peek peel peer perch perform pet photograph pick
    picture pile pilot pin pitch place plant play plow plug point poise poke polish ponder populate pose position
    post pot pounce pour power practice prance prepare press pretend print prop protest protrude pucker puff pull
    push put race rain raise reach react read rear receive recline record reflect relax remain remove renovate
    repair rest restore return ride ring rinse rip rise roam rock roll rollerblade romp rope round row rub run rush
    rust saddle sail salute sample say scale scatter scoot scramble scratch scream screech scrub sculpt search seat
    see seed seem select sell separate serve set sew shade shake shape share shave shear shine ship shoot shop shout
    shovel show shred shuffle side sign signal sing sip sit situate skate skateboard sketch ski skid skip skydive
    slam slant sled sledge sleep slice slide slope slurp smell smile smirk smoke sniff snorkel snow snowboard
    snuggle soak soar socialize sock span speak spectate speed spend spill spin spit splash sport spot sprawl spray
    spread sprinkle sprint squat squeeze squint squirt stack stain stampede stand stare start state station steal
    steam steer step stick stir stitch stock stop store stretch strike strip stroll strum strut study stuff style
    submerge suck supervise surf surprise surround suspend swallow swat sway sweep swerve swim swing swoop tackle
    take talk tap tape taste tax teach tear tell tend test tether text think throw tie tile tilt tiptoe toast top
    toss touch tow tower trade trail train trample transport travel trim trot trudge try tuck tug tumble turn twirl
    twist type unload untie unwrap upturn use vacuum vandalize vault vend view visit wade wait wake wakeboard walk
    wall wander want warn wash watch water wave wear weave weep weigh wheel whip whisper wiggle win wind windsurf
    wing wipe wire wonder work wrap wrestle write yank yawn yell
    """)
NOUN_FIRST = _words("""
    age arch back bat bear bend bite block board boat bowl box burn cage camp canoe carpet chain chop coach coat
    color comb cook crack craft crowd curl curve cycle deal deck design dock dot dress drink drop duck face fall
    feature fence film fire fish fit flower fly forest frame frost glaze group guide hand head herd hood hook horn
    house ice iron kiss label layer light line link load mark match milk mill motor mount name number nurse offer
    order pack paint pan panel park pet picture pile pin pitch place plant plug position post pot power press print
    prop race record ring rock rope round row saddle seat seed shade shape ship shop side sign signal skateboard
    sketch ski sled slice slope smoke snow snowboard sport spot spray stack stain state station steam step stock
    store study style surf tape tax test tile toast top tower trade trail train trim type view wall water wave wheel
    wing wire
    """)

# past participles and past tenses that no rule gives
IRREGULAR_PARTICIPLES = {
    "held": "hold", "laid": "lay", "lain": "lie", "eaten": "eat", "ate": "eat", "taken": "take", "took": "take",
    "made": "make", "seen": "see", "shown": "show", "worn": "wear", "wore": "wear", "driven": "drive", "drove": "drive",
    "ridden": "ride", "rode": "ride", "flown": "fly", "flew": "fly", "thrown": "throw", "threw": "throw",
    "caught": "catch", "bent": "bend", "built": "build", "hung": "hang", "stuck": "stick", "sat": "sit",
    "stood": "stand", "lit": "light", "broken": "break", "written": "write", "drawn": "draw", "grown": "grow",
    "given": "give", "gave": "give", "hidden": "hide", "fallen": "fall", "fell": "fall", "frozen": "freeze",
    "torn": "tear", "sold": "sell", "left": "leave", "kept": "keep", "fed": "feed", "led": "lead", "done": "do",
    "gone": "go", "went": "go", "made-up": "make", 
    "shot": "shoot", "struck": "strike", "swung": "swing", "wound": "wind", "woven": "weave", "shaken": "shake",
    "found": "find", "stolen": "steal", "lost": "lose", "brought": "bring", "bought": "buy", "upturned": "upturn",
    "overgrown": "overgrow", "ran": "run", "swam": "swim", "got": "get", "came": "come", "dug": "dig", "slept": "sleep",
}  # fmt: skip
# verbs whose participle is the verb itself
UNCHANGED_PARTICIPLES = _words("cut put set hit spread")
ING_NOUNS = _words(
    "building ceiling railing frosting clothing painting icing topping wedding evening morning string ring king wing "
    "thing lighting flooring bedding pudding paneling awning dressing stuffing lettering something anything crossing "
    "landing parking serving opening setting meeting drawing spring sling swing duckling sibling"
)
ED_WORDS = _words("bed red shed sled seed weed feed seaweed need speed reed breed bobsled hundred deed heed need")

# words of the classes above and the class that each has most often, as in caption_tags.Token; the last named holds
CLOSED: dict[str, str] = {}
for _tag, _group in (
    ("R", ADVERBS | {"there"}),
    ("I", PREPOSITIONS | LONG_PREPOSITION_TEXTS | {"to"}),
    ("S", SUBORDINATORS),
    ("C", CONJUNCTIONS),
    ("A", AUXILIARIES),
    ("V", HAVE - {"having"}),
    ("G", {"having"}),
    ("B", BE),
    ("O", PRONOUNS),
    ("F", POSSESSIVES),
    ("D", DETERMINERS),
    ("W", RELATIVES),
):
    CLOSED.update(dict.fromkeys(_group, _tag))
LEMMAS = dict.fromkeys(BE, "be") | dict.fromkeys(HAVE, "have") | dict.fromkeys(("do", "does", "did"), "do")

IRREGULAR_NOUNS = {
    "men": "man", "women": "woman", "children": "child", "people": "people", "feet": "foot", "teeth": "tooth",
    "mice": "mouse", "geese": "goose", "sheep": "sheep", "deer": "deer", "fish": "fish", "knives": "knife",
    "leaves": "leaf", "loaves": "loaf", "shelves": "shelf", "halves": "half", "calves": "calf", "wolves": "wolf",
    "scarves": "scarf", "wives": "wife", "lives": "life", "bookshelves": "bookshelf", "firemen": "fireman",
    "policemen": "policeman", "gentlemen": "gentleman", "snowmen": "snowman", "businessmen": "businessman",
    "buses": "bus", "busses": "bus", "glasses": "glasses", "pants": "pants", "jeans": "jeans", "shorts": "shorts",
    "scissors": "scissors", "goggles": "goggles", "sunglasses": "sunglasses", "skis": "ski", "taxis": "taxi",
    "cookies": "cookie", "movies": "movie", "smoothies": "smoothie", "brownies": "brownie", "veggies": "veggie",
    "ties": "tie", "pies": "pie", "shoes": "shoe", "canoes": "canoe", "toes": "toe", "cacti": "cactus", "axes": "axe",
    "oxen": "ox", "elves": "elf", "hooves": "hoof", "selfies": "selfie", "zombies": "zombie", "hoodies": "hoodie",
    "does": "doe", "waves": "wave", "clothes": "clothes", "series": "series", "species": "species",
    "caddies": "caddie", "headphones": "headphone", "caves": "cave", "stoves": "stove", "gloves": "glove",
    "olives": "olive", "sleeves": "sleeve", "curves": "curve", "doves": "dove", "hives": "hive", "groves": "grove",
}  # fmt: skip
PLURAL_WORDS = _words("people sheep deer fish glasses pants jeans shorts scissors goggles sunglasses clothes")
NOT_PLURAL = _words(
    "bus gas glass grass dress cross class mattress moss mass pass boss lens canvas tennis atlas cactus octopus walrus "
    "christmas circus campus chess harness fitness business wilderness hibiscus asparagus hummus citrus "
    "apparatus stylus virus iris pancreas couscous swiss brass waitress actress princess compass press across this his "
    "its us is was has as plus yes always sideways indoors outdoors upwards backwards towards besides perhaps less "
    "topless overpass underpass business campus nexus lexus texas paris kansas las vegas jesus bias oasis bass chaos "
    "molasses trellis debris chassis platypus rhinoceros hippopotamus"
)
