"""The words that tasks are written in. Every word is one token of the bundled model's tokenizer.

The order of these lists is part of the bundled model: a word added anywhere but at the end of the vocabulary changes
what its embeddings mean.
"""

from __future__ import annotations

ADJECTIVES = """
amber ancient angry autumn awkward bitter blue bold brave brief bright broken busy calm careful cheap clean clear
clever cold common cool crisp crooked curious damp dark dear deep dense distant dry dull eager early easy elder empty
equal exact faint fair famous fancy fast fierce final firm flat foreign frail free fresh frozen funny gentle giant
glad golden grand grave gray great green grim happy hard harsh heavy hidden hollow honest huge humble idle jolly keen
kind large late lazy light little lively lonely long loose loud lucky mad major merry mild modern narrow neat new nice
noble noisy odd old orange pale patient plain polite poor proud purple quick quiet rapid rare raw red rich ripe rough
round royal rude rusty sad safe salty scarlet secret sharp short shy silent silver simple slow small smooth soft solid
sour steep stern still strange strict strong sudden sunny sweet swift tall tame thick thin tidy tiny tired tough true
ugly urgent vast violet warm weak weary wet white whole wide wild wise wooden yellow young
""".split()

NOUNS = """
actor anchor animal apple apron arrow artist baker ball band banner barn barrel basin basket beach beacon beam bear
beard bell bench berry bird blade blanket boat bone book boot bottle bow box boy branch bread brick bridge brook broom
brother bucket butter button cabin cable cake camel camera camp candle canoe captain card carpet cart castle cat cave
cellar chain chair chalk cheese chest child church circle citizen clerk cliff clock cloth cloud coach coal coat coin
collar copper corn cotton court cousin cow crane crowd crown cup curtain desert desk diamond doctor dog door dragon
drawer dream dress drum duck eagle earth engine envelope farmer father fence ferry field finger fire fish flag flame
flower flute forest fork fountain fox frog fruit garden gate giraffe girl glass glove goat grape grass guard guest
guitar hammer harbor harp hat hawk hill honey horn horse hotel house hunter island jacket jar jewel judge jungle
kettle key king kitchen kite knife ladder lake lamp lantern lawyer leaf lemon letter lion lizard market mask meadow
medal melon merchant mirror monkey moon mother mountain mouse museum needle nest night nurse oak ocean office onion
orchard oven owl painter palace paper parrot path pearl pencil pepper piano picture pillow pilot pipe pirate planet
plate pocket poet pond potato prince pumpkin puppet queen rabbit raft rain ribbon rice ring river road robin rocket
roof room root rope rose sailor salt sand scarf school sea seed shadow sheep shell shield ship shirt shoe shop shore
sister snake snow soldier song soup spider spoon stable star statue stone storm story stove street student sugar sun
swan sword table tailor teacher temple tent thief thread throne tiger tower town toy train tree trumpet tunnel turtle
uncle valley village violin wagon wall water weaver well wheel whistle wind window wing winter witness wolf wood wool
writer
""".split()

VERBS = """
admires answers asks avoids builds buys calls carries catches chases cleans climbs counts covers crosses draws drops
fears feeds finds fixes follows greets guards hears helps hides holds invites keeps knows leaves lifts likes loves
marks meets misses moves needs notices opens paints passes praises pulls pushes reads remembers saves sees sells sends
serves shows sings studies takes teaches tells thanks touches trusts visits wants warns washes watches writes
""".split()

ADVERBS = """
again alone almost always badly bravely boldly calmly daily easily gladly gently hardly here indeed kindly lately
loudly nearly neatly never often outside perhaps quickly quietly rarely sadly safely seldom slowly softly sometimes
soon suddenly there today together tomorrow usually warmly weekly yesterday
""".split()

# What the templates are written in besides the classes; a test holds them to it. "order" is in no template any more.
OTHERS = """
The the . A one near , of every and are No a but is Some with this Remember magic number in text for Question : What ?
Answer numbers four order where value stored copied to Where found what record Record does hold how word occurs three
most frequent words
""".split()

CLASSES = {"adjective": ADJECTIVES, "noun": NOUNS, "verb": VERBS, "adverb": ADVERBS}
