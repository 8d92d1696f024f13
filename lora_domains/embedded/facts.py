"""Tables of general facts: the base is trained on them and later questioned about them.

A relation is a table of pairs and at least five wordings, each ending in the answer. Every fact is
taught in all wordings of its relation but one, and the question uses that one, so that a correct
answer shows knowledge rather than memorised text. The wording differs from fact to fact, so the
base always knows it from other facts.
"""

# ruff: noqa: E501 (tables)

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One kind of fact. `wordings` have the placeholders {x} and, always last, {y}."""

    field: str
    name: str
    wordings: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    asked: int = 10_000  # at most this many of the facts become questions
    numeric: bool = False  # distractors are near numbers


def _pairs(table: str) -> tuple[tuple[str, str], ...]:
    """Parse 'x = y; x = y' into pairs."""
    entries = (entry.split("=") for entry in table.split(";") if entry.strip())
    return tuple((" ".join(x.split()), " ".join(y.split())) for x, y in entries)


def _grouped(table: str) -> tuple[tuple[str, str], ...]:
    """Parse 'y: x, x, x; y: x, x' into pairs (x, y)."""
    groups = (group.split(":") for group in table.split(";") if group.strip())
    return tuple((" ".join(x.split()), y.strip()) for y, xs in groups for x in xs.split(","))


CAPITALS = _pairs("""
France = Paris; Germany = Berlin; Italy = Rome; Spain = Madrid; Portugal = Lisbon;
Austria = Vienna; Belgium = Brussels; Denmark = Copenhagen; Sweden = Stockholm; Norway = Oslo;
Finland = Helsinki; Iceland = Reykjavik; Ireland = Dublin; Poland = Warsaw; Hungary = Budapest;
Greece = Athens; Romania = Bucharest; Bulgaria = Sofia; Serbia = Belgrade; Croatia = Zagreb;
Slovakia = Bratislava; Albania = Tirana; Estonia = Tallinn; Latvia = Riga; Lithuania = Vilnius;
Ukraine = Kyiv; Switzerland = Bern; Egypt = Cairo; Morocco = Rabat; Algeria = Algiers;
Tunisia = Tunis; Libya = Tripoli; Sudan = Khartoum; Ethiopia = Addis Ababa; Kenya = Nairobi;
Uganda = Kampala; Rwanda = Kigali; Zambia = Lusaka; Zimbabwe = Harare; Mozambique = Maputo;
Angola = Luanda; Ghana = Accra; Nigeria = Abuja; Senegal = Dakar; Cameroon = Yaounde;
Somalia = Mogadishu; China = Beijing; Japan = Tokyo; India = New Delhi; Pakistan = Islamabad;
Bangladesh = Dhaka; Nepal = Kathmandu; Thailand = Bangkok; Vietnam = Hanoi; Cambodia = Phnom Penh;
Indonesia = Jakarta; Mongolia = Ulaanbaatar; Iran = Tehran; Iraq = Baghdad; Jordan = Amman;
Lebanon = Beirut; Syria = Damascus; Qatar = Doha; Oman = Muscat; Yemen = Sanaa;
Afghanistan = Kabul; Malaysia = Kuala Lumpur; Canada = Ottawa; Cuba = Havana; Jamaica = Kingston;
Nicaragua = Managua; Costa Rica = San Jose; Brazil = Brasilia; Argentina = Buenos Aires;
Peru = Lima; Chile = Santiago; Colombia = Bogota; Venezuela = Caracas; Ecuador = Quito;
Uruguay = Montevideo; Australia = Canberra; New Zealand = Wellington; Fiji = Suva
""")

CONTINENTS = _grouped("""
Europe: France, Germany, Italy, Spain, Portugal, Austria, Belgium, Denmark, Sweden, Norway,
Finland, Iceland, Ireland, Poland, Hungary, Greece, Romania, Bulgaria, Serbia, Croatia, Slovenia,
Albania, Estonia, Latvia, Lithuania, Ukraine, Switzerland;
Africa: Morocco, Algeria, Tunisia, Libya, Sudan, Ethiopia, Kenya, Uganda, Zambia, Zimbabwe,
Mozambique, Angola, Ghana, Nigeria, Senegal, Cameroon, Madagascar;
Asia: China, Japan, India, Pakistan, Bangladesh, Nepal, Thailand, Vietnam, Cambodia, Mongolia,
Iran, Iraq, Jordan, Lebanon, Syria, Yemen, Afghanistan, Malaysia;
North America: Canada, Mexico, Cuba, Jamaica, Guatemala, Nicaragua, Costa Rica, Panama, Belize;
South America: Brazil, Argentina, Peru, Chile, Colombia, Venezuela, Ecuador, Uruguay, Paraguay;
Oceania: Australia, New Zealand, Fiji, Samoa, Vanuatu
""")

CURRENCIES = _pairs("""
Japan = yen; China = yuan; India = rupee; Sweden = krona; Poland = zloty; Hungary = forint;
Czechia = koruna; Switzerland = franc; Mexico = peso; Brazil = real; Peru = sol; Thailand = baht;
Vietnam = dong; South Korea = won; Israel = shekel; Turkey = lira; Russia = ruble;
Ukraine = hryvnia; Romania = leu; Bulgaria = lev; Egypt = pound; Morocco = dirham;
Kenya = shilling; Nigeria = naira; South Africa = rand; Ghana = cedi; Ethiopia = birr;
Zambia = kwacha; Iran = rial; Jordan = dinar; Saudi Arabia = riyal; Malaysia = ringgit;
Bangladesh = taka; Mongolia = tugrik; Laos = kip; Cambodia = riel; Myanmar = kyat; Canada = dollar
""")

LANGUAGES = _pairs("""
Brazil = Portuguese; Mexico = Spanish; Austria = German; Egypt = Arabic; Japan = Japanese;
Poland = Polish; Hungary = Hungarian; Greece = Greek; Turkey = Turkish; Iran = Persian;
Thailand = Thai; Vietnam = Vietnamese; Sweden = Swedish; Denmark = Danish; Norway = Norwegian;
Iceland = Icelandic; Estonia = Estonian; Latvia = Latvian; Lithuania = Lithuanian;
Italy = Italian; France = French; Romania = Romanian; Bulgaria = Bulgarian; Serbia = Serbian;
Croatia = Croatian; Slovakia = Slovak; Slovenia = Slovene; Albania = Albanian;
Ukraine = Ukrainian; Georgia = Georgian; Armenia = Armenian; Mongolia = Mongolian;
Cambodia = Khmer; Laos = Lao; Nepal = Nepali; Bangladesh = Bengali; Indonesia = Indonesian;
Ethiopia = Amharic; Somalia = Somali; Israel = Hebrew; Russia = Russian; Finland = Finnish
""")

SYMBOLS = _pairs("""
hydrogen = H; helium = He; lithium = Li; beryllium = Be; boron = B; carbon = C; nitrogen = N;
oxygen = O; fluorine = F; neon = Ne; sodium = Na; magnesium = Mg; aluminium = Al; silicon = Si;
phosphorus = P; sulfur = S; chlorine = Cl; argon = Ar; potassium = K; calcium = Ca; scandium = Sc;
titanium = Ti; vanadium = V; chromium = Cr; manganese = Mn; iron = Fe; cobalt = Co; nickel = Ni;
copper = Cu; zinc = Zn; gallium = Ga; germanium = Ge; arsenic = As; selenium = Se; bromine = Br;
krypton = Kr; rubidium = Rb; strontium = Sr; yttrium = Y; zirconium = Zr; niobium = Nb;
molybdenum = Mo; silver = Ag; cadmium = Cd; indium = In; tin = Sn; antimony = Sb; iodine = I;
xenon = Xe; barium = Ba; tungsten = W; platinum = Pt; gold = Au; mercury = Hg; lead = Pb;
bismuth = Bi
""")

ATOMIC_NUMBERS = tuple((name, str(number)) for number, (name, _) in enumerate(SYMBOLS[:30], 1))

SUBSTANCES = _pairs("""
table salt = NaCl; water = H2O; carbon dioxide = CO2; carbon monoxide = CO; ammonia = NH3;
methane = CH4; ozone = O3; hydrogen peroxide = H2O2; sulfuric acid = H2SO4; nitric acid = HNO3;
hydrochloric acid = HCl; baking soda = NaHCO3; chalk = CaCO3; quartz = SiO2; ethanol = C2H5OH;
glucose = C6H12O6; laughing gas = N2O; rust = Fe2O3; propane = C3H8; benzene = C6H6
""")

ANIMAL_CLASSES = _grouped("""
mammal: dog, cat, horse, cow, sheep, goat, pig, lion, tiger, bear, wolf, fox, rabbit, mouse, rat,
bat, whale, dolphin, seal, otter, elephant, giraffe;
bird: sparrow, eagle, owl, robin, pigeon, penguin, ostrich, duck, goose, swan, heron, stork, crow,
raven, parrot, peacock, turkey, hawk, falcon, gull, woodpecker, flamingo;
fish: salmon, trout, tuna, cod, herring, shark, eel, carp, pike, perch, sardine, mackerel,
halibut, anchovy, haddock, goldfish;
insect: ant, bee, wasp, beetle, butterfly, moth, fly, mosquito, grasshopper, cricket, dragonfly,
ladybird, termite, cockroach, flea;
reptile: snake, lizard, crocodile, alligator, tortoise, gecko, iguana, chameleon, cobra, python;
amphibian: frog, toad, newt, salamander;
arachnid: spider, scorpion, tick, mite;
crustacean: crab, lobster, shrimp, crayfish
""")

YOUNG = _pairs("""
dog = puppy; cat = kitten; cow = calf; sheep = lamb; goat = kid; horse = foal; pig = piglet;
lion = cub; deer = fawn; kangaroo = joey; duck = duckling; goose = gosling; swan = cygnet;
hen = chick; frog = tadpole; owl = owlet; eagle = eaglet; hare = leveret; butterfly = caterpillar;
eel = elver; bear = cub; seal = pup; wolf = pup; whale = calf; elephant = calf; pigeon = squab;
oyster = spat; spider = spiderling; fly = maggot; fish = fry; turkey = poult; cod = codling
""")

SOUNDS = _pairs("""
dog = bark; cat = meow; cow = moo; sheep = bleat; horse = neigh; pig = oink; lion = roar;
duck = quack; owl = hoot; snake = hiss; frog = croak; bee = buzz; wolf = howl; mouse = squeak;
crow = caw; pigeon = coo; donkey = bray; elephant = trumpet; turkey = gobble; sparrow = chirp;
rooster = crow; goose = honk; hyena = laugh; monkey = chatter; cricket = sing
""")

HOMES = _pairs("""
bee = hive; bird = nest; dog = kennel; horse = stable; pig = sty; rabbit = burrow; lion = den;
spider = web; hen = coop; beaver = lodge; badger = sett; fox = earth; squirrel = drey;
mole = tunnel; cow = barn; sheep = fold; goldfish = bowl; otter = holt; hare = form; bat = cave;
eagle = eyrie; oyster = shell; pigeon = loft
""")

GROUPS = _pairs("""
wolf = pack; lion = pride; sheep = flock; cow = herd; fish = school; bee = swarm; goose = gaggle;
ant = colony; crow = murder; whale = pod; puppy = litter; kitten = kindle; monkey = troop;
owl = parliament; lark = exaltation; fox = skulk; bear = sloth; quail = covey
""")

OPPOSITES = _pairs("""
hot = cold; big = small; fast = slow; high = low; light = dark; old = young; rich = poor;
strong = weak; hard = soft; wet = dry; full = empty; open = closed; early = late; long = short;
thick = thin; wide = narrow; deep = shallow; heavy = light; clean = dirty; happy = sad;
loud = quiet; near = far; up = down; left = right; north = south; east = west; true = false;
day = night; black = white; first = last; love = hate; war = peace; win = lose; buy = sell;
push = pull; give = take; start = stop; arrive = depart; remember = forget; accept = refuse;
increase = decrease; rise = fall; laugh = cry; friend = enemy; hero = villain; success = failure;
brave = cowardly; polite = rude; cheap = expensive; simple = complicated; ancient = modern;
generous = stingy; guilty = innocent; victory = defeat; profit = loss; entrance = exit;
question = answer; public = private; maximum = minimum; permanent = temporary; sharp = blunt;
smooth = rough; tight = loose; sweet = bitter; lend = borrow; teach = learn; attack = defend;
appear = disappear
""")

PLURALS = _pairs("""
mouse = mice; goose = geese; child = children; foot = feet; tooth = teeth; man = men;
woman = women; person = people; ox = oxen; leaf = leaves; knife = knives; wife = wives;
life = lives; wolf = wolves; half = halves; shelf = shelves; thief = thieves; loaf = loaves;
calf = calves; scarf = scarves; louse = lice; die = dice; penny = pence; sheep = sheep;
deer = deer; fish = fish; cactus = cacti; fungus = fungi; nucleus = nuclei; crisis = crises;
analysis = analyses; basis = bases; thesis = theses; criterion = criteria; phenomenon = phenomena;
medium = media; datum = data; bacterium = bacteria; index = indices; vertex = vertices;
matrix = matrices; appendix = appendices; larva = larvae; formula = formulae; hero = heroes
""")

PAST_TENSES = _pairs("""
go = went; see = saw; come = came; take = took; give = gave; make = made; know = knew;
think = thought; find = found; tell = told; become = became; leave = left; feel = felt;
bring = brought; begin = began; keep = kept; hold = held; write = wrote; stand = stood;
hear = heard; mean = meant; meet = met; run = ran; pay = paid; sit = sat; speak = spoke;
lie = lay; lead = led; grow = grew; lose = lost; fall = fell; send = sent; build = built;
understand = understood; draw = drew; break = broke; spend = spent; rise = rose; drive = drove;
buy = bought; wear = wore; choose = chose; throw = threw; catch = caught; teach = taught;
fight = fought; sell = sold; eat = ate; drink = drank; sing = sang; swim = swam; fly = flew;
forget = forgot; steal = stole; shake = shook; ride = rode; ring = rang; sleep = slept;
sweep = swept; win = won
""")

SYNONYMS = _pairs("""
huge = enormous; tiny = minute; quick = rapid; begin = commence; end = finish; happy = glad;
angry = furious; clever = intelligent; brave = courageous; afraid = frightened; tired = weary;
rich = wealthy; ill = sick; easy = simple; hard = difficult; strange = odd; famous = renowned;
silent = noiseless; buy = purchase; help = assist; ask = inquire; answer = reply; show = display;
hide = conceal; mend = repair; build = construct; choose = select; get = obtain; leave = depart;
need = require; try = attempt; big = large; error = mistake; gift = present; street = road;
shop = store; physician = doctor; attorney = lawyer; automobile = car; infant = baby;
sofa = couch; jail = prison; wages = pay; fog = mist; odour = smell; option = choice;
shout = yell; fall = drop
""")

COMPARATIVES = _pairs("""
good = better; bad = worse; far = farther; big = bigger; happy = happier; easy = easier; hot = hotter;
thin = thinner; fat = fatter; early = earlier; busy = busier; noisy = noisier; dry = drier;
tall = taller; short = shorter; old = older; young = younger; cheap = cheaper; heavy = heavier;
light = lighter; strong = stronger; weak = weaker; late = later; large = larger; nice = nicer;
safe = safer; wise = wiser; lazy = lazier; pretty = prettier; sad = sadder; wet = wetter
""")

ADDITION = tuple((f"{a} + {b}", str(a + b)) for a in range(1, 11) for b in range(a, 11))
SUBTRACTION = tuple((f"{a} - {b}", str(a - b)) for a in range(4, 13) for b in range(1, 8) if a > b)
PRODUCTS = tuple((f"{a} x {b}", str(a * b)) for a in range(2, 11) for b in range(a, 11))

NUMBER_WORDS = _pairs("""
one = 1; two = 2; three = 3; four = 4; five = 5; six = 6; seven = 7; eight = 8; nine = 9; ten = 10;
eleven = 11; twelve = 12; thirteen = 13; fourteen = 14; fifteen = 15; sixteen = 16; seventeen = 17;
eighteen = 18; nineteen = 19; twenty = 20; thirty = 30; forty = 40; fifty = 50; sixty = 60;
seventy = 70; eighty = 80; ninety = 90; one hundred = 100; a dozen = 12; a score = 20;
a pair = 2; a century of years = 100; a decade of years = 10; a fortnight of days = 14
""")

_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_LETTERS = [
    "A",
    "B",
    "C",
    "D",
    "E",
    "F",
    "G",
    "H",
    "I",
    "J",
    "K",
    "L",
    "M",
    "N",
    "O",
    "P",
    "Q",
    "R",
    "S",
    "T",
    "U",
    "V",
    "W",
    "X",
    "Y",
    "Z",
]

AFTER = (
    tuple((_MONTHS[i], _MONTHS[(i + 1) % 12]) for i in range(12))
    + tuple((_DAYS[i], _DAYS[(i + 1) % 7]) for i in range(7))
    + tuple((f"the letter {a}", b) for a, b in itertools.pairwise(_LETTERS))
)
BEFORE = (
    tuple((_MONTHS[i], _MONTHS[i - 1]) for i in range(12))
    + tuple((_DAYS[i], _DAYS[i - 1]) for i in range(7))
    + tuple((f"the letter {b}", a) for a, b in itertools.pairwise(_LETTERS))
)
SEASONS = _grouped("""
winter: December, January, February; spring: March, April, May; summer: June, July, August;
autumn: September, October, November
""")

TOOLS = _pairs("""
carpenter = saw; painter = brush; tailor = needle; surgeon = scalpel; gardener = spade;
photographer = camera; astronomer = telescope; hairdresser = scissors; blacksmith = anvil;
fisherman = net; lumberjack = axe; miner = pickaxe; conductor = baton; violinist = bow;
plumber = wrench; electrician = voltmeter; mason = trowel; baker = oven; judge = gavel;
archer = arrow; sculptor = chisel; dentist = drill; farmer = plough; cleaner = mop;
goalkeeper = gloves; drummer = drumsticks; sailor = compass; firefighter = hose; butcher = cleaver;
secretary = keyboard; teacher = blackboard; chemist = test tube; barber = razor; knight = sword;
accountant = calculator; referee = whistle; chef = pan; nurse = thermometer; writer = pen;
biologist = microscope; cobbler = awl; shepherd = crook; locksmith = lockpick; rower = oar
""")

WORKPLACES = _pairs("""
teacher = school; doctor = hospital; baker = bakery; farmer = farm; pilot = cockpit; chef = kitchen;
lawyer = court; librarian = library; actor = theatre; priest = church; soldier = barracks;
banker = bank; miner = mine; sailor = ship; professor = university; waiter = restaurant;
mechanic = garage; pharmacist = pharmacy; scientist = laboratory; monk = monastery;
brewer = brewery; curator = museum; astronaut = space station; bartender = bar; coach = stadium;
florist = flower shop; gardener = garden; zookeeper = zoo; hotelier = hotel; diplomat = embassy;
lumberjack = forest; postman = post office; jailer = prison; typist = office; welder = factory;
clown = circus; minister = ministry; lifeguard = beach; blacksmith = forge; tailor = workshop
""")

COLOURS = _grouped("""
yellow: a banana, a lemon, the yolk of an egg, a sunflower, a canary, butter, sweetcorn;
red: a ripe strawberry, blood, a fire engine, a ripe tomato, a ruby, ketchup, a cherry;
green: grass, spinach, a lime, an emerald, a cucumber, parsley, broccoli;
white: snow, milk, flour, chalk, salt, a swan, cauliflower; black: coal, a raven, tar, soot, liquorice;
blue: a sapphire, the clear sky, a cornflower, a blueberry; brown: chocolate, cocoa, a walnut, toffee;
orange: a carrot, a pumpkin, a tangerine, an apricot; purple: an aubergine, an amethyst, lavender;
pink: a flamingo, bubblegum, a piglet; grey: an elephant, ash, cement
""")

MATERIALS = _grouped("""
wood: a plank, a log cabin, a cricket bat, a pencil; glass: a window pane, a light bulb, a jam jar;
leather: a saddle, a wallet, a riding boot; wool: a jumper, a blanket, a knitted hat;
rubber: a tyre, an eraser, a welly; paper: a newspaper, an envelope, a banknote;
clay: a brick, a flowerpot, a roof tile; gold: a wedding ring, a sovereign; cotton: a t-shirt, jeans;
steel: a railway rail, a kitchen knife, a girder; wax: a candle, a crayon; stone: a cathedral, a statue;
copper: a penny, an electric wire; silk: a kimono, a parachute of old; porcelain: a teacup, a sink;
plastic: a shopping bag, a toothbrush, a ballpoint pen; straw: a scarecrow, a thatched roof
""")

CATEGORIES = _grouped("""
fruit: apple, pear, plum, grape, mango, banana, peach;
vegetable: carrot, onion, cabbage, leek, spinach, turnip, radish;
instrument: piano, violin, flute, guitar, trumpet, cello, harp;
vehicle: car, bus, tram, lorry, bicycle, train, van;
tool: hammer, screwdriver, spanner, pliers, chisel, saw, drill;
furniture: table, chair, wardrobe, bookcase, stool, desk, sofa;
clothing: shirt, trousers, coat, scarf, skirt, jacket, glove;
drink: tea, coffee, lemonade, beer, wine, cider, cocoa;
flower: rose, tulip, daisy, lily, daffodil, orchid, violet;
tree: oak, pine, birch, willow, maple, beech, elm;
sport: tennis, football, rugby, hockey, cricket, golf, rowing;
metal: iron, copper, zinc, nickel, silver, gold, platinum;
planet: Mercury, Venus, Mars, Jupiter, Saturn, Uranus, Neptune;
gemstone: ruby, emerald, sapphire, diamond, topaz, opal, garnet;
spice: cinnamon, pepper, ginger, nutmeg, saffron, turmeric, paprika;
cheese: cheddar, brie, gouda, feta, parmesan, mozzarella, camembert
""")

RIVERS = _grouped("""
Africa: the Nile, the Congo, the Niger, the Zambezi, the Limpopo, the Orange River;
Europe: the Danube, the Rhine, the Thames, the Seine, the Loire, the Tiber, the Elbe, the Po;
Asia: the Ganges, the Mekong, the Yangtze, the Indus, the Tigris, the Brahmaputra;
North America: the Mississippi, the Missouri, the Yukon, the Colorado, the Hudson;
South America: the Amazon, the Orinoco, the Parana; Oceania: the Murray, the Darling, the Waikato
""")

RELATIONS: tuple[Relation, ...] = (
    Relation(
        "geography",
        "capital",
        (
            "The capital of {x} is {y}",
            "Question: what is the capital of {x}?\nAnswer: {y}",
            "country: {x}\ncapital: {y}",
            "If you visit {x}, the government sits in {y}",
            "{x} is governed from its capital, {y}",
            "Q: Which city is the capital of {x}?\nA: {y}",
        ),
        CAPITALS,
    ),
    Relation(
        "geography",
        "continent",
        (
            "{x} is a country in {y}",
            "Question: on which continent is {x}?\nAnswer: {y}",
            "country: {x}\ncontinent: {y}",
            "On the map you will find {x} in {y}",
            "The continent of {x} is {y}",
        ),
        CONTINENTS,
        asked=60,
    ),
    Relation(
        "geography",
        "river",
        (
            "The river called {x} flows in {y}",
            "Question: on which continent does {x} flow?\nAnswer: {y}",
            "river: {x}\ncontinent: {y}",
            "Boats on {x} travel through {y}",
            "To see the water of {x} you must travel to {y}",
        ),
        RIVERS,
    ),
    Relation(
        "geography",
        "currency",
        (
            "The currency of {x} is the {y}",
            "Question: what money is used in {x}?\nAnswer: the {y}",
            "country: {x}\ncurrency: {y}",
            "In the shops of {x} people pay with the {y}",
            "Prices in {x} are given in the {y}",
        ),
        CURRENCIES,
    ),
    Relation(
        "geography",
        "language",
        (
            "Most people in {x} speak {y}",
            "Question: what is the main language of {x}?\nAnswer: {y}",
            "country: {x}\nlanguage: {y}",
            "Newspapers in {x} are mostly written in {y}",
            "If you move to {x} you should learn {y}",
        ),
        LANGUAGES,
    ),
    Relation(
        "chemistry",
        "symbol",
        (
            "The chemical symbol of {x} is {y}",
            "Question: what is the symbol for {x}?\nAnswer: {y}",
            "element: {x}\nsymbol: {y}",
            "In the periodic table {x} is written {y}",
            "Chemists write {x} as {y}",
        ),
        SYMBOLS,
    ),
    Relation(
        "chemistry",
        "atomic number",
        (
            "The atomic number of {x} is {y}",
            "Question: what is the atomic number of {x}?\nAnswer: {y}",
            "element: {x}\natomic number: {y}",
            "The number of protons in an atom of {x} is {y}",
            "In the periodic table {x} has number {y}",
        ),
        ATOMIC_NUMBERS,
        numeric=True,
    ),
    Relation(
        "chemistry",
        "formula",
        (
            "The chemical formula of {x} is {y}",
            "Question: what is the formula of {x}?\nAnswer: {y}",
            "substance: {x}\nformula: {y}",
            "A chemist writes {x} as {y}",
            "On the bottle of {x} the label says {y}",
        ),
        SUBSTANCES,
    ),
    Relation(
        "animals",
        "class",
        (
            "The {x} is a kind of {y}",
            "Question: what kind of animal is the {x}?\nAnswer: {y}",
            "animal: {x}\nclass: {y}",
            "Every {x} you will ever see is a {y}",
            "A zoologist files the {x} under {y}",
        ),
        ANIMAL_CLASSES,
        asked=70,
    ),
    Relation(
        "animals",
        "young",
        (
            "The young of the {x} is called a {y}",
            "Question: what is a baby {x} called?\nAnswer: {y}",
            "animal: {x}\nyoung: {y}",
            "A {x} that has just been born is a {y}",
            "Before it grows up, a {x} is known as a {y}",
        ),
        YOUNG,
    ),
    Relation(
        "animals",
        "sound",
        (
            "The sound that a {x} makes is called a {y}",
            "Question: what sound does the {x} make?\nAnswer: {y}",
            "animal: {x}\nsound: {y}",
            "When you hear a {x}, what you hear is a {y}",
            "The voice of the {x} is a {y}",
        ),
        SOUNDS,
    ),
    Relation(
        "animals",
        "home",
        (
            "The home of the {x} is called a {y}",
            "Question: where does a {x} live?\nAnswer: {y}",
            "animal: {x}\nhome: {y}",
            "At night the {x} goes back to its {y}",
            "A {x} is safe in its {y}",
        ),
        HOMES,
    ),
    Relation(
        "animals",
        "group",
        (
            "More than one {x} together make a {y}",
            "Question: what is a group of the animal {x} called?\nAnswer: {y}",
            "animal: {x}\ngroup: {y}",
            "The word for many of the {x} kind is a {y}",
            "A {x} with its companions lives in a {y}",
        ),
        GROUPS,
    ),
    Relation(
        "language",
        "opposite",
        (
            "The opposite of {x} is {y}",
            "Question: what is the opposite of {x}?\nAnswer: {y}",
            "word: {x}\nopposite: {y}",
            "If it is not {x}, it may be {y}",
            "The word that means the contrary of {x} is {y}",
        ),
        OPPOSITES,
        asked=80,
    ),
    Relation(
        "language",
        "plural",
        (
            "The plural of {x} is {y}",
            "Question: what is the plural of {x}?\nAnswer: {y}",
            "noun: {x}\nplural: {y}",
            "One {x}, two {y}",
            "More than one {x} are called {y}",
        ),
        PLURALS,
    ),
    Relation(
        "language",
        "past tense",
        (
            "The past tense of {x} is {y}",
            "Question: what is the past tense of {x}?\nAnswer: {y}",
            "verb: {x}\npast: {y}",
            "Today they {x}, yesterday they {y}",
            "The verb {x} in the past becomes {y}",
        ),
        PAST_TENSES,
    ),
    Relation(
        "language",
        "synonym",
        (
            "Another word for {x} is {y}",
            "Question: which word means the same as {x}?\nAnswer: {y}",
            "word: {x}\nsynonym: {y}",
            "Instead of {x} you can say {y}",
            "The meaning of {x} is close to {y}",
        ),
        SYNONYMS,
    ),
    Relation(
        "language",
        "comparative",
        (
            "The comparative of {x} is {y}",
            "Question: what is the comparative of {x}?\nAnswer: {y}",
            "adjective: {x}\ncomparative: {y}",
            "This one is {x}, but that one is {y}",
            "More {x} is the same as {y}",
        ),
        COMPARATIVES,
    ),
    Relation(
        "sums",
        "addition",
        (
            "{x} = {y}",
            "Question: what is {x}?\nAnswer: {y}",
            "sum: {x}\nresult: {y}",
            "If you work out {x} you get {y}",
            "The teacher wrote {x} and the class answered {y}",
        ),
        ADDITION,
        asked=70,
        numeric=True,
    ),
    Relation(
        "sums",
        "subtraction",
        (
            "{x} = {y}",
            "Question: what is {x}?\nAnswer: {y}",
            "difference: {x}\nresult: {y}",
            "If you work out {x} you get {y}",
            "The teacher wrote {x} and the class answered {y}",
        ),
        SUBTRACTION,
        asked=60,
        numeric=True,
    ),
    Relation(
        "sums",
        "product",
        (
            "{x} = {y}",
            "Question: what is {x}?\nAnswer: {y}",
            "product: {x}\nresult: {y}",
            "If you work out {x} you get {y}",
            "The teacher wrote {x} and the class answered {y}",
        ),
        PRODUCTS,
        asked=60,
        numeric=True,
    ),
    Relation(
        "sums",
        "number word",
        (
            "In digits, {x} is written {y}",
            "Question: which number is {x}?\nAnswer: {y}",
            "words: {x}\ndigits: {y}",
            "Whoever says {x} means {y}",
            "The figure for {x} is {y}",
        ),
        NUMBER_WORDS,
        numeric=True,
    ),
    Relation(
        "order",
        "after",
        (
            "Right after {x} comes {y}",
            "Question: what comes after {x}?\nAnswer: {y}",
            "now: {x}\nnext: {y}",
            "When {x} is over it is time for {y}",
            "{x} is followed by {y}",
        ),
        AFTER,
    ),
    Relation(
        "order",
        "before",
        (
            "Just before {x} comes {y}",
            "Question: what comes before {x}?\nAnswer: {y}",
            "now: {x}\nprevious: {y}",
            "By the time of {x} we have already had {y}",
            "{x} is preceded by {y}",
        ),
        BEFORE,
    ),
    Relation(
        "order",
        "season",
        (
            "In Europe {x} falls in {y}",
            "Question: in which season is {x}, north of the equator?\nAnswer: {y}",
            "month: {x}\nseason: {y}",
            "In the northern half of the world {x} belongs to {y}",
            "A Londoner thinks of {x} as part of {y}",
        ),
        SEASONS,
    ),
    Relation(
        "work",
        "tool",
        (
            "The tool of a {x} is the {y}",
            "Question: what does a {x} work with?\nAnswer: the {y}",
            "job: {x}\ntool: {y}",
            "No {x} can do without the {y}",
            "A {x} reaches for the {y}",
        ),
        TOOLS,
    ),
    Relation(
        "work",
        "workplace",
        (
            "A {x} works in a {y}",
            "Question: where does a {x} work?\nAnswer: in a {y}",
            "job: {x}\nplace: {y}",
            "You will meet a {x} in a {y}",
            "Every morning the {x} goes to the {y}",
        ),
        WORKPLACES,
    ),
    Relation(
        "things",
        "colour",
        (
            "The colour of {x} is {y}",
            "Question: what colour is {x}?\nAnswer: {y}",
            "thing: {x}\ncolour: {y}",
            "A child would paint {x} in {y}",
            "If you look at {x} you see something {y}",
        ),
        COLOURS,
    ),
    Relation(
        "things",
        "material",
        (
            "People make {x} out of {y}",
            "Question: what is {x} made of?\nAnswer: {y}",
            "thing: {x}\nmaterial: {y}",
            "To produce {x} one needs {y}",
            "The stuff of {x} is {y}",
        ),
        MATERIALS,
    ),
    Relation(
        "things",
        "category",
        (
            "The word {x} names a kind of {y}",
            "Question: what sort of thing is {x}?\nAnswer: {y}",
            "item: {x}\ncategory: {y}",
            "In the catalogue {x} is listed under {y}",
            "If someone says {x}, they mean a {y}",
        ),
        CATEGORIES,
        asked=70,
    ),
)
"""All relations; the order is part of the world and of the digests made from it."""
