"""The fact tables behind the `general` set. Countries, people and firms are invented; the rest is ordinary knowledge, kept short."""

# Who it is explained to, and in what manner.
READERS = (
    ("a child of nine", "friendly"),
    ("a curious neighbour", "friendly"),
    ("a busy shopkeeper", "short"),
    ("a class of beginners", "full"),
    ("somebody who never liked science", "friendly"),
    ("a newspaper reader", "full"),
    ("a visitor to a museum", "full"),
    ("my grandmother", "friendly"),
)
PICTURE_STARTS = ("Think of", "Picture", "Compare it with", "It is much like")
EXAMPLE_STARTS = ("For example,", "You can see it at home:", "A case everybody knows:", "To give an example,")

# What is asked (a clause), the reason, a picture (a noun phrase), an example (a sentence).
EXPLANATIONS = (
    (
        "why leaves turn red in autumn",
        "the tree takes back the green dye and other colours are left",
        "a stage whose green curtain is drawn aside",
        "maples show it first on cold bright days",
    ),
    (
        "why the sky is blue",
        "air scatters short blue waves of sunlight more than long red ones",
        "small pebbles that turn back ripples but not swells",
        "at sunset the light travels further and the red remains",
    ),
    (
        "how a lever works",
        "a long arm trades distance for force",
        "a seesaw with a child far out and an adult near the middle",
        "a bottle opener lifts the cap with little effort",
    ),
    (
        "why bread rises",
        "yeast eats sugar and gives off gas that the dough holds in",
        "thousands of tiny balloons in a net",
        "dough left in a cold room rises much more slowly",
    ),
    (
        "why ice floats",
        "water takes up more room when it freezes, so ice is lighter than water",
        "a crowd that holds hands at arm's length",
        "a full bottle bursts in the freezer",
    ),
    (
        "how a rainbow forms",
        "drops bend sunlight and split it into its colours",
        "a thousand small glass prisms hung in the air",
        "a garden hose makes one when the sun is behind you",
    ),
    (
        "why we see lightning before thunder",
        "light is far faster than sound",
        "a runner and a snail who start together",
        "three seconds between the two mean about one kilometre",
    ),
    (
        "how a magnet finds north",
        "the earth is itself a magnet and turns the needle along its field",
        "grass that the wind combs one way",
        "a needle on a cork in a bowl turns by itself",
    ),
    (
        "why onions make us cry",
        "cut cells release a gas that stings the eyes",
        "a tiny alarm that the plant sets off",
        "a chilled onion stings less",
    ),
    (
        "how soap cleans",
        "one end of each soap particle holds fat and the other holds water",
        "a hand that takes the grease by one sleeve and the water by the other",
        "cold water alone runs off a greasy pan",
    ),
    (
        "why the moon changes its shape",
        "we see more or less of its sunlit half while it goes round us",
        "a ball carried around a lamp",
        "a half moon in the evening is growing",
    ),
    (
        "why the sea has tides",
        "the moon pulls the near water more than the far water",
        "a blanket tugged at one edge",
        "most harbours have high water twice a day",
    ),
    (
        "how a vaccine protects",
        "it shows the body a harmless part of a germ so that the defence can practise",
        "a wanted poster handed out before the thief comes",
        "measles became rare where most children had the injection",
    ),
    (
        "why metal feels colder than wood",
        "metal carries the warmth of the hand away faster",
        "a wide road and a narrow path out of a town",
        "a spoon and a chopstick from the same drawer feel different",
    ),
    (
        "how bees find flowers again",
        "a bee that found food dances the direction and distance for the others",
        "a traveller who draws a map on the table",
        "a longer waggle means a longer flight",
    ),
    (
        "why prices rise",
        "more money chases the same goods, or goods become scarce",
        "ten buyers at a stall with one melon",
        "after a late frost cherries cost twice as much",
    ),
    (
        "what interest on a loan is",
        "the lender is paid for waiting and for the risk",
        "rent, but for money",
        "a hundred crowns at five per cent cost five crowns a year",
    ),
    (
        "why we yawn together",
        "people copy each other's faces without thinking",
        "a clap that spreads through a hall",
        "even reading about it makes some people yawn",
    ),
    (
        "how a thermos keeps tea hot",
        "a gap without air stops warmth from passing",
        "a castle whose bridge is up",
        "it keeps lemonade cold just as well",
    ),
    (
        "why salt melts ice",
        "salty water freezes only at a lower temperature",
        "a guest who keeps the others from sitting down",
        "winter roads stay wet instead of slippery",
    ),
    (
        "how compost is made",
        "small creatures eat peel and leaves and leave dark soil",
        "a slow kitchen that works in reverse",
        "a heap that is turned gets warm inside",
    ),
    (
        "why cats purr",
        "small muscles in the throat flutter while the cat breathes",
        "a flag in a light wind",
        "some cats purr when they are unwell too",
    ),
    (
        "how a lock lifts a boat",
        "water let into the chamber raises everything that floats on it",
        "a bathtub with a toy in it",
        "the boat leaves by the upper gate without an engine",
    ),
    (
        "why we have leap years",
        "the earth needs about a quarter of a day more than 365 days to go round the sun",
        "a clock that is put right every four years",
        "without them, spring would slowly move through the calendar",
    ),
    (
        "how a bicycle stays up",
        "the rider steers under the fall, again and again",
        "a broom balanced on a finger",
        "it is harder to ride very slowly",
    ),
    (
        "why bats hang upside down",
        "they drop into flight because their legs are too weak to jump up",
        "a diver on a board",
        "a tendon locks the claws so that it costs no effort",
    ),
    (
        "how glass is made",
        "sand melts with soda and lime and cools without forming crystals",
        "honey that sets before it can sort itself",
        "a bottle can be melted and blown again",
    ),
    (
        "why fog lies in valleys",
        "cold air is heavy, sinks, and lets its water go",
        "cream at the bottom of a bowl",
        "from the hill you look down on a white lake",
    ),
    (
        "how a password manager helps",
        "it remembers long random passwords so that you need to remember one",
        "a key cabinet with a single good lock",
        "a leak at one shop then opens no other door",
    ),
    (
        "what a balanced budget is",
        "what comes in covers what goes out",
        "a bathtub whose tap and drain match",
        "a club that earns 900 and spends 900 crowns has one",
    ),
    (
        "why muscles ache after sport",
        "small tears in the fibres swell while they heal",
        "a road under repair",
        "the ache is worst on the second day",
    ),
    (
        "how seeds know when to sprout",
        "water and warmth wake an embryo that was waiting",
        "a tent that unfolds when it gets wet",
        "some seeds need a frost first",
    ),
    (
        "why mirrors swap left and right",
        "a mirror swaps front and back, and we imagine that we have turned round",
        "a glove pulled inside out",
        "writing on glass read from behind looks the same way",
    ),
    (
        "how a dam makes electricity",
        "falling water turns a wheel that turns a generator",
        "a pinwheel under a tap",
        "opening the gates a little more gives more power at noon",
    ),
    (
        "why birds fly in a V",
        "each bird rides on the rising air behind its neighbour",
        "cyclists who take turns in front",
        "geese swap the lead every few minutes",
    ),
    (
        "what a pun is",
        "a word with two meanings lets one sentence say two things",
        "a coin that shows both sides",
        "a baker who kneads the dough also needs the money",
    ),
    (
        "how paper is recycled",
        "water loosens the fibres and a sieve lays them down anew",
        "porridge spread thin and dried",
        "after about six rounds the fibres are too short",
    ),
    (
        "why shadows are long in the evening",
        "low sunlight meets us from the side",
        "a torch held near the floor",
        "a fence post can throw a shadow of ten metres",
    ),
    (
        "how insurance works",
        "many people pay a little so that the few with a loss are covered",
        "a village that keeps one bucket of coins for fires",
        "a broken window costs you only the agreed share",
    ),
    (
        "why we dream",
        "the sleeping brain sorts what it has taken in",
        "a clerk who files papers at night",
        "people woken during quick eye movements often tell a dream",
    ),
    (
        "how a sundial tells the time",
        "the shadow of a rod moves as the sun crosses the sky",
        "the hand of a clock that the sky turns",
        "it is an hour off in summer time",
    ),
    (
        "why tea gets darker the longer it stands",
        "the leaves give off more and more of their dye and bitter matter",
        "a sponge that slowly lets go",
        "two minutes and six minutes taste like two kinds",
    ),
)

# Topic, casual text, formal text, brief text.
MESSAGES = (
    (
        "a late parcel",
        "hey, where's my parcel?? should've been here monday!",
        "I am writing to ask about a parcel that was due on Monday and has not arrived. Could you tell me where it is?",
        "Parcel due Monday not here. Where is it?",
    ),
    (
        "a noisy heater",
        "the heater in my flat is banging all night, come fix it already",
        "The heater in my flat makes loud noises during the night. I would be grateful if somebody could repair it this week.",
        "Heater bangs at night; please repair this week.",
    ),
    (
        "a moved meeting",
        "cant do tuesday, thursday ok?",
        "Unfortunately I am unable to attend on Tuesday. Would Thursday at the same time be convenient for you?",
        "Tuesday impossible. Thursday, same time?",
    ),
    (
        "a wrong bill",
        "you charged me twice lol, give me one back",
        "I notice that the amount was charged twice in March. Please return one of the two payments.",
        "Charged twice in March; please refund one.",
    ),
    (
        "a lost umbrella",
        "did anyone find a green umbrella? left it on the tram",
        "I believe that I left a green umbrella on the tram last evening. May I ask whether it has been handed in?",
        "Green umbrella left on tram last evening. Found?",
    ),
    (
        "a garden party",
        "party in my garden sat, bring stuff to grill!",
        "You are kindly invited to a party in the garden on Saturday. Guests are asked to bring something for the grill.",
        "Garden party Saturday; bring food for the grill.",
    ),
    (
        "a cancelled course",
        "no pottery tmrw, teacher's got the flu",
        "We regret that tomorrow's pottery course cannot take place because the teacher is ill. The fee will be returned.",
        "Pottery cancelled tomorrow, teacher ill, fee returned.",
    ),
    (
        "a borrowed ladder",
        "hey can i grab your ladder for the weekend? promise i'll bring it back",
        "Would you be so kind as to lend me your ladder over the weekend? I shall return it on Monday morning.",
        "May I borrow your ladder until Monday?",
    ),
    (
        "a broken screen",
        "my new phone's screen cracked after 2 days, not cool",
        "The screen of the telephone that I bought two days ago has cracked. I ask for a replacement under the warranty.",
        "New phone, cracked screen after two days; please replace.",
    ),
    (
        "a delayed train",
        "train's stuck again, start without me, ill be half an hour late",
        "My train has been delayed, and I shall arrive about half an hour late. Please begin without me.",
        "Train late; start without me, there in 30 minutes.",
    ),
    (
        "a good hotel stay",
        "place was great, breakfast wow, we'll be back",
        "We very much enjoyed our stay and would like to praise the breakfast in particular. We look forward to coming again.",
        "Lovely stay, superb breakfast, will return.",
    ),
    (
        "a job application",
        "saw your ad, i can sort stuff in a warehouse, can start whenever",
        "I read your advertisement with interest. I have experience in a warehouse and could begin at any time.",
        "Warehouse experience, free to start any time.",
    ),
    (
        "a library fine",
        "sorry the book's late, was ill, do i really have to pay?",
        "I apologise for the late return of the book, which was due to illness. I would be glad if the fine could be waived.",
        "Book late through illness; please waive the fine.",
    ),
    (
        "a stray dog",
        "there's a brown dog running around by the school, someone should get it",
        "I would like to report a brown dog without a collar near the school. It seems to be lost and should be collected.",
        "Lost brown dog, no collar, near the school.",
    ),
)

# Occasion, the usual things, things that only some would think of.
OCCASIONS = (
    (
        "a day at the lake",
        ["a towel", "swimwear", "sandwiches", "a ball", "a blanket", "a change of clothes"],
        ["a rubbish bag", "goggles", "a dry bag for keys"],
    ),
    (
        "a mountain hike",
        ["sturdy boots", "a map", "two litres of water", "a fleece", "plasters", "nuts and raisins"],
        ["a whistle", "walking poles", "a spare pair of laces"],
    ),
    (
        "a picnic in the park",
        ["a basket", "plates and cups", "bread and cheese", "fruit", "a rug", "napkins"],
        ["a corkscrew", "salt in a twist of paper", "a pack of cards"],
    ),
    (
        "a night train",
        ["a ticket", "earplugs", "a book", "a toothbrush", "slippers", "a bottle of water"],
        ["an eye mask", "a small padlock", "biscuits for the neighbours"],
    ),
    (
        "a hospital visit",
        ["flowers", "a magazine", "clean pyjamas", "grapes", "a charger", "a card"],
        ["slippers", "a photograph from home", "a puzzle book"],
    ),
    (
        "a school trip",
        ["a packed lunch", "a raincoat", "pocket money", "a notebook", "a pencil", "an emergency number"],
        ["a bag for travel sickness", "a class list", "wet wipes"],
    ),
    (
        "a camping weekend",
        ["a tent", "a sleeping bag", "matches", "a pot", "a torch", "a rope"],
        ["a mallet", "spare batteries", "a folding chair"],
    ),
    (
        "a first day at work",
        ["an identity card", "bank details", "a pen", "a lunch box", "a notepad", "comfortable shoes"],
        ["a mug", "the name of the contact person", "a spare shirt"],
    ),
    (
        "a bicycle tour",
        ["a helmet", "a pump", "a repair kit", "a water bottle", "a lock", "a route card"],
        ["chain oil", "a reflective vest", "a spare inner tube"],
    ),
    (
        "a house viewing",
        ["a tape measure", "a list of questions", "a notepad", "a camera", "proof of income", "a floor plan"],
        ["a compass", "a phone charger to test sockets", "a marble to test the floor"],
    ),
    (
        "a flea market stall",
        ["a folding table", "small change", "price tags", "a tablecloth", "bags", "a chair"],
        ["a mirror", "a cash box", "a sign that says half price"],
    ),
    (
        "a choir rehearsal",
        ["the scores", "a pencil", "a water bottle", "throat sweets", "a folder", "a tuning fork"],
        ["reading glasses", "a cushion", "the list of dates"],
    ),
    (
        "a birdwatching walk",
        ["binoculars", "a field guide", "a notebook", "quiet shoes", "a thermos", "a hat"],
        ["a folding stool", "a list of calls", "a camera with a long lens"],
    ),
    (
        "a baking afternoon",
        ["an apron", "flour", "a rolling pin", "cutters", "butter", "a cooling rack"],
        ["boxes to take cakes home", "a timer", "coloured sugar"],
    ),
)
# A circumstance, and the thing that it asks for.
CIRCUMSTANCES = {
    "in heavy rain": "a waterproof cover",
    "with two small children": "a favourite toy",
    "on a very hot day": "sun cream",
    "with a dog": "a leash and a bowl",
    "on a tight budget": "a thermos of home-made tea",
    "when it may get dark": "a head torch",
    "with a friend who is allergic to nuts": "snacks without nuts",
    "with a guest who speaks another language": "a phrase book",
}

SHOPS = (
    ("the greengrocer's", [("melons", 7), ("lettuces", 3), ("pineapples", 8), ("bags of potatoes", 6)]),
    ("the stationer's", [("notebooks", 4), ("fountain pens", 13), ("rolls of tape", 2), ("calendars", 9)]),
    ("the baker's", [("loaves", 5), ("plum tarts", 11), ("pretzels", 2), ("bags of rusks", 4)]),
    ("the garden centre", [("rose bushes", 14), ("bags of soil", 6), ("clay pots", 3), ("watering cans", 9)]),
    ("the toy shop", [("kites", 12), ("puzzles", 8), ("wooden trains", 15), ("skipping ropes", 4)]),
    ("the hardware store", [("hammers", 11), ("boxes of screws", 3), ("paint brushes", 5), ("torches", 8)]),
)
# A vehicle, and speeds (even, so that half hours give whole kilometres).
VEHICLES = (
    ("coach", (60, 70, 80)),
    ("cyclist", (14, 16, 18)),
    ("ferry", (20, 26, 30)),
    ("goods train", (50, 64, 90)),
    ("rowing team", (8, 10, 12)),
    ("old lorry", (40, 44, 56)),
)
SHARES = (
    ("apples", "a crate", "children"),
    ("stickers", "a box", "pupils"),
    ("seedlings", "a tray", "gardeners"),
    ("marbles", "a jar", "players"),
    ("chocolates", "a tin", "guests"),
    ("leaflets", "a stack", "volunteers"),
    ("chairs", "a store room", "classrooms"),
    ("tickets", "a roll", "families"),
)

CLASSES = {
    "birds": ["heron", "wren", "stork", "magpie", "puffin", "kestrel", "nightjar"],
    "fish": ["perch", "herring", "eel", "trout", "carp", "halibut", "pike"],
    "insects": ["wasp", "beetle", "cricket", "moth", "earwig", "termite", "mayfly"],
    "trees": ["alder", "larch", "hornbeam", "cedar", "poplar", "yew", "rowan"],
    "tools": ["chisel", "pliers", "rasp", "spanner", "trowel", "plane", "mallet"],
    "metals": ["tin", "zinc", "copper", "nickel", "cobalt", "silver", "lead"],
    "instruments": ["oboe", "cello", "bassoon", "lute", "harp", "trombone", "zither"],
    "garments": ["waistcoat", "shawl", "mitten", "cardigan", "kilt", "anorak", "tunic"],
    "vehicles": ["tram", "barge", "sledge", "tractor", "scooter", "gondola", "hearse"],
    "vegetables": ["leek", "parsnip", "chard", "radish", "turnip", "fennel", "kohlrabi"],
    "spices": ["cumin", "saffron", "mace", "cardamom", "clove", "sumac", "turmeric"],
    "gemstones": ["opal", "garnet", "topaz", "beryl", "jade", "ruby", "peridot"],
    "dances": ["waltz", "tango", "polka", "rumba", "minuet", "foxtrot", "jig"],
    "rooms": ["pantry", "attic", "cellar", "nursery", "study", "scullery", "parlour"],
}

# An event, and its steps with minutes.
EVENTS = (
    (
        "a chess tournament for beginners",
        [("welcome and draw", 20), ("first two rounds", 60), ("soup and bread", 40), ("last two rounds", 60), ("prizes", 15)],
    ),
    (
        "a street clean-up",
        [
            ("gloves, bags and teams", 15),
            ("sweep the upper street", 50),
            ("tea break", 20),
            ("clear the ditch", 45),
            ("weigh the bags", 10),
        ],
    ),
    ("a birthday for a seven-year-old", [("presents", 30), ("treasure hunt", 50), ("cake", 30), ("puppet show", 40)]),
    ("a repair café", [("set up tables and lamps", 25), ("first repairs", 75), ("coffee", 20), ("second repairs", 75), ("tidy up", 20)]),
    ("a poetry evening", [("doors and drinks", 30), ("first three poets", 45), ("interval", 20), ("open stage", 50)]),
    ("a first aid course", [("introductions", 15), ("recovery position", 40), ("break", 15), ("bandages in pairs", 45), ("questions", 20)]),
    ("a book swap", [("sort the books by kind", 30), ("swap", 80), ("story for children", 25), ("pack what is left", 20)]),
    ("an office move", [("label all boxes", 40), ("carry shelves", 60), ("lunch", 45), ("set up desks", 70), ("test the phones", 25)]),
    ("a harvest supper", [("lay the tables", 35), ("speeches", 15), ("supper", 80), ("dancing", 70)]),
    ("a village fun run", [("numbers and pins", 35), ("warm-up", 15), ("children's race", 30), ("main race", 60), ("medals", 20)]),
    (
        "a choir workshop",
        [("breathing and scales", 25), ("learn the first piece", 55), ("break", 20), ("second piece", 55), ("small concert", 20)],
    ),
    ("a seed-sowing day", [("hand out trays", 15), ("sow tomatoes", 35), ("break", 15), ("sow herbs", 35), ("label and water", 20)]),
    ("a neighbours' breakfast", [("carry out tables", 20), ("bake rolls", 25), ("breakfast", 75), ("wash up together", 25)]),
    ("a photography walk", [("camera basics", 25), ("old town", 50), ("café stop", 30), ("harbour", 45), ("show the pictures", 30)]),
)
# A limit, and what it means for the plan.
LIMITS = (
    ("for twelve people", "Twelve chairs are enough."),
    ("with little money", "Everything is borrowed, so keep a list of what goes back."),
    ("with children present", "Keep the pauses: children tire early."),
    ("in cold weather", "Ask everybody to bring a warm layer."),
    ("with only two helpers", "Give one helper the door and the other the clock."),
    ("when rain is likely", "Keep half an hour in hand for a shower."),
    ("for people who do not know each other", "Name tags at the door help."),
    ("with guests in wheelchairs", "Use the side entrance, which has a ramp."),
)

# A project, what kind of place it was in, the wish, the trouble (a past clause), the result (a past clause).
REPORTS = (
    (
        "a footbridge",
        "a town split by a stream",
        "a safe way to school",
        "a flood carried off the first posts",
        "the bridge opened in time for the new school year",
    ),
    (
        "a night bus",
        "a valley with few cars",
        "to get young people home safely",
        "hardly anybody used it",
        "the bus was kept because the weekend trips were full",
    ),
    ("a shared bakery oven", "a hill town", "to save fuel", "nobody knew how to fire it", "forty loaves a week are baked there"),
    (
        "a swift colony",
        "a place of old towers",
        "to bring the birds back",
        "the first boxes hung in the sun",
        "eleven pairs nested under the eaves",
    ),
    (
        "a tool library",
        "a suburb of small gardens",
        "to buy less and lend more",
        "three drills came back broken",
        "each tool is now borrowed every second week",
    ),
    (
        "a community choir",
        "a mining town",
        "to give newcomers a place to meet",
        "the hall lost its roof in a storm",
        "the first concert was sold out",
    ),
    (
        "a solar roof",
        "a farming parish",
        "cheaper power for the school",
        "the panels were delivered cracked",
        "the school sells power in summer",
    ),
    (
        "a mobile library",
        "a district of islands",
        "books for the outer villages",
        "the boat failed its inspection",
        "it now visits nine landing stages",
    ),
    ("a rain garden", "a low-lying quarter", "to keep cellars dry", "the plants drowned in the first week", "no cellar has flooded since"),
    (
        "a youth workshop",
        "a harbour quarter",
        "to teach carpentry and welding",
        "the neighbours feared the noise",
        "six of the young people found apprenticeships",
    ),
    ("a chestnut avenue", "a spa resort", "shade for walkers", "a late frost killed half of the saplings", "the second planting took root"),
    (
        "a local history film",
        "a former mill town",
        "to save the stories of the old",
        "the sound of the interviews was lost",
        "the film was shown in the old mill",
    ),
    (
        "a dry-stone wall",
        "a sheep-farming parish",
        "to keep the flock off the road",
        "the first stretch collapsed",
        "no sheep has been hit by a car this year",
    ),
    (
        "a repair of the clock tower",
        "a market town",
        "to hear the hours again",
        "a bell was found to be cracked",
        "the clock strikes once more, a little lower than before",
    ),
)

# Country, capital, river, highest peak, its height in metres, goods, climate, position.
COUNTRIES = (
    ("Veldania", "Orsk Haven", "Silver Ouse", "Mount Tarrow", 2140, "amber and rye", "cool and windy", "a flat country on a northern bay"),
    ("Karavos", "Pellamine", "Drakos", "Mount Ilex", 3015, "olives and marble", "dry with mild winters", "a peninsula of white cliffs"),
    (
        "Omberlin",
        "Stavering",
        "Lower Mirre",
        "the Kettelhorn",
        3790,
        "cheese and clockwork",
        "snowy from November to April",
        "a land of high valleys without a coast",
    ),
    (
        "Tessaro",
        "Luma",
        "Rio Pardo",
        "Cerro Viento",
        4460,
        "coffee and silver",
        "hot below and frosty above",
        "a narrow strip between ocean and mountains",
    ),
    ("Hallamar", "Brinewick", "Tolve", "Grey Stack", 880, "herring and wool", "wet all the year", "a chain of seventy islands"),
    (
        "Qasmira",
        "Al Narsha",
        "Wadi Senn",
        "Jebel Katar",
        1675,
        "dates and glass",
        "hot with cold nights",
        "a desert country with one long gulf",
    ),
    (
        "Ruvenia",
        "Castrel",
        "Dvora",
        "Crow Peak",
        2510,
        "plums and timber",
        "warm in summer and foggy in autumn",
        "a wooded country in the middle of the continent",
    ),
    ("Belmarais", "Port Cygne", "Saune", "Mont Aubry", 1320, "wine and lace", "mild and sunny", "a country of low hills along a warm sea"),
    (
        "Nyokoro",
        "Tamale Bridge",
        "Great Kess",
        "Mount Undari",
        5130,
        "tea and copper",
        "rainy twice a year",
        "a highland round a large lake",
    ),
    (
        "Issenfjord",
        "Havnesund",
        "Isk",
        "Frostnabb",
        2290,
        "salmon and turbines",
        "cold with light summer nights",
        "a coast cut by deep inlets",
    ),
    (
        "Port Lyle",
        "Lyle Town",
        "Mangrove Creek",
        "Signal Hill",
        410,
        "nutmeg and sugar",
        "hot and damp, with storms in August",
        "a green island near the equator",
    ),
    (
        "Zhentai",
        "Baishu",
        "Jade Run",
        "Crane Mountain",
        3340,
        "silk and porcelain",
        "wet in early summer and dry for the rest of the year",
        "a country of terraces and bamboo",
    ),
    (
        "Ardmoor",
        "Glenhollow",
        "Wharrel",
        "Ben Sorrach",
        1190,
        "whisky and slate",
        "cloudy with short bright spells",
        "a moorland country with a stormy coast",
    ),
    ("Solmira", "Vega Alta", "Aguarola", "Pico Dorado", 3605, "oranges and cork", "long dry summers", "a sunny plain ringed by mountains"),
)

# A season, and what it means for a traveller.
SEASONS = {
    "in spring": "Paths can be muddy, so take good shoes.",
    "in summer": "Set out early, before the heat and the crowds.",
    "in autumn": "It is harvest time, so ask for what is fresh.",
    "in winter": "Days are short, so plan half as much.",
}

# A dish, its ingredients for one person, the steps, the minutes.
DISHES = (
    (
        "lentil soup",
        [(60, " g", "red lentils"), (0.5, "", "carrots"), (250, " ml", "stock")],
        ["fry the chopped carrots", "add lentils and stock", "simmer until soft and stir well"],
        30,
    ),
    (
        "vegetable curry",
        [(100, " g", "cauliflower"), (80, " g", "chickpeas"), (100, " ml", "coconut milk")],
        ["toast the spices", "add the vegetables", "pour in the coconut milk and simmer"],
        35,
    ),
    (
        "potato pancakes",
        [(200, " g", "potatoes"), (0.5, "", "onions"), (15, " g", "flour")],
        ["grate potatoes and onions and press them dry", "mix with flour and salt", "fry flat cakes on both sides"],
        40,
    ),
    (
        "tomato pasta",
        [(100, " g", "pasta"), (150, " g", "tomatoes"), (1, "", "garlic cloves")],
        ["boil the pasta", "soften garlic and tomatoes in oil", "toss both together with a little cooking water"],
        25,
    ),
    (
        "mushroom risotto",
        [(75, " g", "round rice"), (100, " g", "mushrooms"), (300, " ml", "stock")],
        ["brown the mushrooms", "stir in the rice", "add hot stock by the ladle until creamy"],
        40,
    ),
    (
        "apple crumble",
        [(150, " g", "apples"), (40, " g", "oats"), (20, " g", "sugar")],
        ["slice the apples into a dish", "rub oats, sugar and fat together and scatter on top", "bake until golden"],
        45,
    ),
    (
        "pea omelette",
        [(2, "", "eggs"), (50, " g", "peas"), (10, " ml", "oil")],
        ["beat the eggs with salt", "warm the peas in the pan", "pour the eggs over and fold when set"],
        15,
    ),
    (
        "bean chilli",
        [(120, " g", "kidney beans"), (100, " g", "tinned tomatoes"), (0.5, "", "peppers")],
        ["fry the peppers with cumin", "add beans and tomatoes", "cook slowly until thick"],
        50,
    ),
    (
        "fish pie",
        [(120, " g", "white fish"), (150, " g", "potatoes"), (50, " ml", "milk")],
        ["poach the fish in the milk", "mash the potatoes", "cover the fish with mash and bake"],
        55,
    ),
    (
        "pumpkin soup",
        [(200, " g", "pumpkin"), (200, " ml", "stock"), (0.5, "", "onions")],
        ["soften onions and pumpkin", "add the stock and cook for twenty minutes", "blend until smooth"],
        35,
    ),
    (
        "rice salad",
        [(70, " g", "rice"), (50, " g", "sweetcorn"), (0.5, "", "cucumbers")],
        ["cook and cool the rice", "dice the cucumbers", "mix all with lemon and herbs"],
        25,
    ),
    (
        "cabbage stir-fry",
        [(150, " g", "white cabbage"), (0.5, "", "carrots"), (10, " ml", "soy sauce")],
        ["slice everything thinly", "fry hot for four minutes", "finish with the soy sauce"],
        15,
    ),
    (
        "stuffed peppers",
        [(1, "", "peppers"), (50, " g", "rice"), (60, " g", "minced meat")],
        ["cut the tops off", "fill with half-cooked rice and meat", "bake in tomato sauce"],
        60,
    ),
    (
        "banana porridge",
        [(50, " g", "oats"), (200, " ml", "milk"), (0.5, "", "bananas")],
        ["bring oats and milk to the boil", "stir over low heat", "top with sliced bananas"],
        10,
    ),
)
# A wish, what it changes among the ingredients, and a hint.
WISHES = (
    ("on a camp stove", "leave out whatever needs cooling", "Chop everything at home before you set off."),
    (
        "for a guest who avoids dairy",
        "use oat milk or oil wherever milk or butter is called for",
        "Check the stock cube for milk powder as well.",
    ),
    ("for one guest with a small appetite besides", "make one portion half as large", "Offer seconds later."),
    ("on a small budget", "buy what is in season and leave out anything dear", "The shop's own brands do just as well."),
    ("ahead for tomorrow", "keep the garnish in a separate box", "Cool it within two hours and warm it through."),
    ("with children helping", "weigh everything into bowls beforehand", "Let the children stir and keep the knife yourself."),
    ("for a cold evening", "plan hot tea and toast alongside", "Warm the plates before you serve."),
)
