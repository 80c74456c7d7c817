"""256 short words, one for each byte, to compare a fingerprint by voice. Never reorder: people wrote them down."""

WORDS = tuple(
    """
acid acorn actor album alley alpha amber anchor angle ankle apple apron arena armor arrow atlas
attic autumn axle bacon badge bagel baker balsa banjo barn basin basket beach beard beaver bell
bench berry bike bingo birch bishop bison blanket blossom board bolt bonus border bottle boxer brass
bread brick bridge bronze brush bucket butter button cabin cable cactus camel candle canoe canvas carbon
carpet castle cedar cello chalk cherry chess chimney cider cinema circle citrus clay cliff clock cloud
clover cobra cocoa coffee comet copper coral cotton cousin cradle crane crater cricket crown crystal cube
daisy dancer delta denim desert dial diamond dinner doctor dolphin donkey dragon drum eagle easel echo
eclipse elbow ember engine fabric falcon farmer feather fender ferry fiddle field finger flame flute forest
fossil fountain fox galaxy garden garlic ginger giraffe glacier glove goblet granite grape guitar gravel hammer
harbor harvest hazel helmet heron hockey honey horizon hotel hunter iceberg igloo indigo insect iris island
ivory jacket jaguar jasmine jelly jersey jewel jigsaw jungle juniper kayak kernel kettle kitten koala ladder
lagoon lantern laser lava lemon leopard library lilac linen lizard lobster lotus lumber lunar magnet mango
maple marble meadow melon meteor mirror mitten monkey mosaic motor muffin museum mustard napkin nectar needle
nephew nickel ninja nutmeg oasis ocean olive onion opal orbit orchid otter oyster paddle panda paper
parrot pasta peanut pebble pencil pepper piano pigeon pilot pirate planet plaza pocket polar pond poplar
prism puzzle quartz rabbit radar raven ribbon river robin rocket saddle salmon satin tulip velvet walnut
""".split()
)
