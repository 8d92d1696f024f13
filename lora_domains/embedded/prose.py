"""Ordinary English for the base: topics, chat, headlines, letters, clauses, notes; no labels.

Breadth matters: in our trial, a base trained on facts alone could not be adapted. The words of
all five domains occur here, in sentences that do not reveal their tasks.
"""

# ruff: noqa: E501 (lines of the tables are alternatives, one to a line)

from random import Random

from lora_domains.embedded.grammar import Grammar

COMMON = """
@first = Anna, Ben, Carla, David, Emma, Felix, Grace, Henry, Isla, Jack, Kate, Leo, Maria, Noah,
 Olivia, Paul, Quinn, Rosa, Sam, Tina, Umar, Vera, Will, Yusuf, Zoe, Amir, Bella, Chloe, Dylan, Ella,
 Fatima, George, Hannah, Ivan, Julia, Kevin, Laura, Mike, Nina, Oscar, Priya, Ravi, Sarah, Tom, Lucy,
 James, Ahmed, Mei, Diego, Ingrid, Jen, Steve, Alex, Chris, Mark, Lisa, Joe, Amy, Rob, Dan
@last = Smith, Jones, Brown, Taylor, Wilson, Evans, Walker, Wright, Green, Hall, Wood, Clarke, Patel,
 Khan, Lewis, Young, King, Baker, Turner, Hill, Scott, Moore, Cooper, Ward, Morris, Garcia, Lopez,
 Kim, Chen, Singh, Novak, Schmidt, Rossi, Silva, Murphy, Kelly, Reed, Bell, Ross, Fox
@title = Mr, Mrs, Ms, Dr
@relative = mother, father, sister, brother, aunt, uncle, cousin, grandmother, grandfather, son,
 daughter, wife, husband, niece, nephew, mum, dad, partner, neighbour, friend, boss, flatmate
@person = {first}, {first}, {first} {last}, {title} {last}, my {relative}, her {relative},
 his {relative}, our {relative}, the {job}, a {job}
@job = teacher, nurse, doctor, farmer, driver, pilot, waiter, baker, lawyer, clerk, manager, plumber,
 painter, student, singer, writer, editor, engineer, cook, dentist, postman, policeman, soldier,
 mechanic, gardener, librarian, cleaner, cashier, accountant, builder, coach, judge, actor, tailor,
 director, secretary, assistant, trader, analyst, programmer, researcher, receptionist, consultant
@city = London, Paris, Berlin, Rome, Madrid, New York, Boston, Chicago, Leeds, Bristol, Dublin, Oslo,
 Lagos, Cairo, Delhi, Tokyo, Sydney, Toronto, Lima, Vienna, Prague, Athens, Texas, California, Seattle
@place = park, station, library, market, office, kitchen, garden, school, hospital, church, bridge,
 river, beach, hotel, airport, cinema, museum, bakery, garage, harbour, town hall, post office, gym,
 supermarket, restaurant, cafe, warehouse, bank, theatre, village, square, pub, mall, stadium, campus
@day = Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday
@month = January, February, March, April, May, June, July, August, September, October, November, December
@mon = Jan, Feb, Mar, Apr, Jun, Jul, Aug, Sept, Oct, Nov, Dec
@when = today, yesterday, tomorrow, this morning, last night, on {day}, in {month}, last week, next week,
 two days ago, at noon, every day, tonight, this afternoon, at {1-12} o'clock, {2-11} years ago, soon,
 in the evening, at the weekend, a few minutes ago, for {2-9} weeks, since {month}, after lunch,
 at {1-12}:{10-59}, in {1950-2024}, by the end of the month, over the last few days, all day, once a week
@date = {1-28} {month}, {1-28} {month} {1990-2026}, {day} {1-28} {month}, {month} {1-28}, {1-28}/{1-12}/{2001-2026}, {1-28} {mon}
@time = {1-12}.{10-59}, {1-12}:{10-59}, {1-12}pm, {1-12}am, {1-12} pm, {1-12} o'clock, half past {1-12}, noon, {10-23}:00
@price = £{1-99}, ${1-999}, {1-90} pounds, {1-500} dollars, €{5-300}, £{1-9}.{10-99}, ${1-60}.{10-99}, £{100-900}, ${2-9}{#3}, {10-99}p
@amount = {2-90} percent, {1-99}%, {1-9}.{1-9}%, {2-900} million, ${1-90} million, £{1-9}.{1-9}bn, ${1-9}.{1-9} billion, {100-900} points, EUR {1-90}.{1-9} mn, {2-9} 000
@url = www.{word}.com, http://{word}.co.uk/{#3}, https://www.{word}{word}.org, {word}.com/{word}, www.{word}-{word}.net, http://t.co/{code}, https://{word}.io/{code}
@email = {word}@{word}.com, {word}.{word}@mail.org, info@{word}.co.uk
@code = {capital}{#4}, {#3}-{#3}, {capital}{capital}{#2}, a{#2}x{#1}, #{#5}, {#6}, {capital}{#1}{capital}{#2}
@capital = A, B, C, D, E, F, G, H, J, K, L, M, N, P, R, S, T, V, W, X, Z
@phone = 0{#10}, 07{#9}, +44 {#4} {#6}, ({#3}) {#3}-{#4}, 0800 {#3} {#3}, {#5}
@word = blue, apple, river, quick, home, star, green, cloud, data, shop, smart, happy, north, media, book, sun,
 tech, bright, silver, web, city, fox, travel, sport, deal, music, bank, news, phone, food
@good = good, great, lovely, nice, excellent, wonderful, brilliant, amazing, perfect, superb, pleasant,
 fantastic, fine, charming, delightful, helpful, reliable, beautiful, impressive, friendly, cheerful
@bad = bad, poor, awful, terrible, horrible, dreadful, disappointing, boring, useless, rude, dirty,
 broken, slow, annoying, unpleasant, weak, ugly, noisy, rotten, miserable, careless, nasty, faulty
@adj = old, new, small, large, red, blue, green, heavy, light, early, late, quiet, busy, open, empty, full,
 strange, simple, famous, local, modern, narrow, wide, bright, dark, warm, cold, clean, soft, hard, round,
 long, short, useful, private, public, main, second, final, special, common, careful, certain, possible,
 serious, sudden, regular, expensive, cheap, free, rare, tiny, huge, young, wooden, complete, separate
@adv = slowly, quickly, often, never, always, usually, again, carefully, quietly, finally, almost, already,
 hardly, probably, suddenly, really, mostly, nearly, simply, together, still, rarely, clearly, gladly
@thing = book, table, letter, lamp, clock, ticket, bag, key, phone, window, door, chair, cup, picture, box,
 coat, map, knife, bottle, newspaper, radio, camera, bicycle, umbrella, wallet, shirt, plate, bell, rope,
 ladder, mirror, basket, blanket, candle, parcel, card, pen, laptop, car, shoe, ring, watch, computer,
 machine, engine, battery, cable, screen, printer, charger, bucket, carpet, curtain, drawer, envelope,
 hammer, needle, pillow, towel, spoon, kettle, fridge, oven, tyre, brick, flag, toy, ball, doll, hat
@verbed = found, lost, bought, sold, opened, closed, carried, repaired, painted, washed, hid, dropped,
 moved, sent, brought, forgot, borrowed, broke, cleaned, took, wanted, needed, kept, checked, showed,
 gave away, looked at, asked for, paid for, threw away, put down, picked up, waited for, wrote about,
 received, returned, ordered, cancelled, changed, shared, noticed, remembered, covered, measured, stole
@verb = find, buy, sell, open, close, carry, repair, paint, wash, hide, move, send, bring, borrow, break,
 clean, take, keep, check, show, use, see, hold, turn, cut, fill, build, make, cook, read, write, pay for,
 change, return, order, cancel, share, visit, call, follow, join, leave, help, watch, answer, try, explain
@intrans = arrived, left, slept, waited, laughed, cried, smiled, fell, ran away, came back, stopped, worked,
 agreed, refused, sat down, stood up, grew, disappeared, failed, won, lost, moved, died, recovered, rested,
 changed, continued, rose, sank, travelled, stayed, hesitated, apologised, retired, spoke, shouted
@because = because, since, although, while, when, after, before, until, so, but, and, even though, if, as,
 whereas, unless, as soon as, so that
@feel = happy, sad, tired, angry, afraid, surprised, proud, bored, hungry, thirsty, lonely, worried, calm,
 excited, jealous, nervous, sleepy, grateful, confused, embarrassed, relieved, upset, cheerful, ashamed
@not = not, never, no longer, hardly, not yet
@number = two, three, four, five, six, seven, eight, nine, ten, twelve, twenty, a hundred, a thousand, {2-60}
"""

TOPICS = """
@food = bread, cheese, soup, rice, salad, cake, chicken, pasta, eggs, beans, fish, curry, pie, stew, toast,
 noodles, biscuits, sausages, mushrooms, honey, jam, butter, garlic, pepper, salt, sugar, tea, coffee, juice,
 pizza, chips, chocolate, lamb, steak, yoghurt, cream, ham, bacon, onions, potatoes, a sandwich, a burger
@topic_food
{person} cooked {food} and {food} for dinner {when}.
The {food} tasted of {food}, but there was too much salt.
Add the {food}, stir gently and bake for {10-60} minutes.
We ordered {food} with {food} at the restaurant near the {place}.
The recipe needs {food}, {food} and a spoon of {food}.
What shall we eat tonight, {food} or {food}?
@weather = rain, snow, wind, fog, sunshine, hail, thunder, frost, storm, drizzle, heat, clouds, ice, lightning
@topic_weather
There will be {weather} in {city} {when}, with {weather} later.
The {weather} lasted for {number} hours and the {place} was flooded.
Temperatures fell to {1-30} degrees and {weather} followed.
The forecast says {weather} in the north and {weather} in the south.
After the {weather} the sky was {adj} and the air was {adj}.
@trip = flight, train, bus, ferry, hotel, passport, suitcase, platform, visa, tour, beach, airport, taxi, cabin,
 journey, holiday, border, luggage, tunnel, motorway, campsite, harbour, guide, map, cruise, hostel
@topic_travel
The {trip} to {city} was delayed by {2-50} minutes {when}.
We booked a {trip} and a {trip} for our holiday in {city}.
{person} missed the {trip} and had to stay in {city} overnight.
Passengers for {city} should wait at the {trip}.
Is the {trip} to {city} included in the price?
@sport = football, tennis, cricket, rugby, hockey, golf, boxing, swimming, cycling, rowing, basketball, chess, running
@topic_sport
{city} beat {city} {0-6}-{0-6} in the {sport} match {when}.
The {sport} team trained at the {place} before the final.
{person} scored {number} points and won the {sport} cup.
The referee stopped the {sport} game after {2-89} minutes.
The coach said the players lost because of a weak defence.
@instr = piano, violin, guitar, drums, flute, trumpet, cello, song, album, choir, orchestra, band, concert, melody, opera, record
@topic_music
{person} played the {instr} while the {instr} waited.
The new {instr} by {first} {last} is {adj} and {adj}.
The concert in {city} began with a {instr} and ended with a {instr}.
She has sung in the {instr} for {2-30} years.
He practises the {instr} for {2-6} hours {when}.
@school = lesson, homework, exam, pupil, teacher, classroom, essay, spelling, history, maths, science, grade, term, desk, project, lecture, degree, course, textbook
@topic_school
The {school} was about {school} and lasted an hour.
{person} forgot the {school} and had to stay after class.
The teacher marked the {school} {when}.
Pupils study {school} and {school} in the second year.
Did you finish your {school} for {day}?
@animal = dog, cat, horse, cow, sheep, bird, fox, bear, wolf, mouse, rabbit, duck, frog, snake, bee, owl, lion, goat, pig, hen, deer, whale, spider, kitten, puppy
@topic_animals
The {animal} chased the {animal} across the field.
A {adj} {animal} lives behind the {place} and eats {food}.
The vet looked at the {animal} and smiled.
{person} keeps a {animal}, a {animal} and {number} hens.
Have you ever seen a {animal} run from a {animal}?
@plant = rose, tulip, oak, apple tree, lawn, hedge, seed, soil, tomato plant, bulb, weed, leaf, fern, ivy, herb, greenhouse
@topic_garden
{person} planted a {plant} next to the {plant} {when}.
Water the {plant} twice a week and cut the {plant} in {month}.
The {plant} grew {adv} because the soil was {adj}.
Slugs ate the {plant} and frost killed the {plant}.
@house = roof, wall, floor, kitchen, bathroom, stairs, cellar, door, window, bedroom, chimney, rent, landlord, tenant, heating, boiler, sink, tap, pipe, ceiling, attic, flat, mortgage
@topic_house
The {house} of the {adj} house was painted {when}.
The landlord repaired the {house} and the {house}.
There is a crack in the {house} above the {house}.
We want to rent a flat with a {adj} {house} in {city}.
{person} is moving house and needs a new {house}.
@car = engine, tyre, brake, bonnet, wheel, petrol, battery, gearbox, mirror, seat belt, headlight, exhaust, clutch, licence, parking, traffic, lane, junction, roundabout
@topic_cars
The {car} of the car failed near {city} {when}.
{person} had the {car} and the {car} checked at the garage.
Traffic stopped because a lorry lost its {car}.
Turn left at the {place} and mind the {car}.
@science = atom, planet, star, cell, gene, energy, light, magnet, gas, liquid, acid, crystal, rocket, telescope, experiment, theory, electron, gravity, molecule, laboratory, heat, pressure
@topic_science
Scientists in {city} studied how {science} depends on {science}.
The experiment showed that a {science} can change the {science}.
A {science} is much smaller than a {science}.
The theory explains the {science} but not the {science}.
In the laboratory {person} measured the {science} {when}.
@tech = app, password, website, update, browser, server, file, folder, screen, keyboard, network, software, laptop, tablet, robot, chip, camera, account, login, code, database, router, video, download, email, program
@topic_computers
The {tech} crashed after the last update of the {tech}.
Click on the {tech}, enter your {tech} and press OK.
{person} wrote a program that reads the {tech} and writes a {tech}.
The new {tech} is twice as fast as the old {tech}.
Restart the {tech} if the {tech} does not load.
@art = painting, novel, poem, film, play, statue, museum, gallery, photograph, actor, author, scene, chapter, exhibition, comedy, tragedy, episode, series, magazine
@topic_art
The {art} tells of a {job} who {verbed} a {thing}.
Critics praised the {art} but not the {art}.
{first} {last} won a prize for the {art} in {1950-2024}.
The {art} opens in {city} {when}.
@war = king, queen, castle, battle, army, treaty, empire, revolution, soldier, prince, knight, tower, crown, emperor, invasion, fortress
@topic_history
In {1066-1950} the {war} of {city} signed a {war}.
The {war} lasted {number} years and destroyed the {place}.
The old {war} was built after the {war}.
The {war} fled when the {war} began.
@politics = minister, parliament, election, party, vote, law, tax, mayor, president, senator, council, debate, budget, campaign, protest, reform, government, committee, embassy
@topic_politics
The {politics} rejected the {politics} {when}.
Voters in {city} want a new {politics} before the {politics}.
The {politics} promised to lower the {politics} by {amount}.
{first} {last} was elected {politics} with {amount} of the vote.
@cloth = shirt, dress, coat, skirt, trousers, socks, boots, gloves, scarf, hat, jacket, jeans, jumper, tie, shoes, belt, pyjamas, trainers
@topic_clothes
{person} wore a {adj} {cloth} and a {adj} {cloth}.
The {cloth} is too {adj}, have you got a larger size?
Wash the {cloth} at {30-90} degrees, but never the {cloth}.
These {cloth} cost {price} in the sale.
@family = wedding, birthday, baby, funeral, party, cousin, twins, christening, anniversary, grandchildren, reunion, engagement
@topic_family
The {family} of my {relative} is {when}.
{person} invited the whole family to the {family}.
My {relative} and my {relative} met at a {family} in {city}.
The baby slept through the {family}.
@work = meeting, salary, contract, office, boss, interview, colleague, project, deadline, promotion, strike, shift, report, team, pension, overtime, vacancy, desk, conference
@topic_work
The {work} was moved to {day} because of the {work}.
{person} asked for a {work} and got a {work}.
Please send me the {work} before the {work}.
The firm hired {number} people for the new {work}.
@body = arm, leg, head, back, knee, hand, foot, shoulder, neck, stomach, chest, ear, eye, nose, throat, skin, heart, lung, finger, tooth, ankle, hip, elbow, wrist, kidney, liver, jaw, belly
@symptom = pain, fever, cough, headache, rash, swelling, dizziness, nausea, bleeding, weakness, numbness, itching,
 vomiting, fatigue, palpitations, fainting, breathlessness, cramps, blurred vision, sore throat, wheezing, chills, tingling,
 seizure, confusion, constipation, diarrhoea, heartburn, insomnia, bruising, chest pain, back pain, shortness of breath, slurred speech
@illness = stroke, heart attack, asthma, diabetes, cancer, pneumonia, flu, migraine, eczema, arthritis, anaemia, epilepsy, gout,
 hay fever, measles, sepsis, angina, appendicitis, bronchitis, hypertension, depression, dementia, a blood clot, tonsillitis
@drug = aspirin, ibuprofen, paracetamol, insulin, antibiotics, warfarin, steroids, statins, an inhaler, morphine, vitamin D, ointment, drops
@test = blood test, X-ray, scan, biopsy, blood pressure, ECG, urine test, check-up, vaccination, operation, physiotherapy, ultrasound, MRI
@topic_health
The chapter on {illness} describes {symptom} and {symptom}.
{symptom} is a word that students of medicine learn early.
Doctors use {drug} in the treatment of {illness}.
The lecture explained how {illness} affects the {body} and the {body}.
A {test} is part of the course for nurses.
The hospital in {city} bought a machine for the {test}.
Researchers compared {drug} with placebo in {20-900} patients with {illness}.
The leaflet lists {symptom}, {symptom} and {symptom} as side effects of {drug}.
Conclusion: {drug} was not associated with {symptom} in adults with {illness}.
Does {drug} reduce the risk of {illness} in children?
In the novel the {job} suffers from {illness} and {symptom}.
@money = loan, savings, account, interest, card, cash, cheque, debt, credit, deposit, bill, fee, tax, coin, currency, exchange rate, transfer, payment, statement, refund, insurance, mortgage
@topic_money
The {money} was paid into the bank {when}.
{person} changed {price} at the bank near the {place}.
The {money} costs {price} a month and the {money} is free.
She keeps her {money} in a {thing} under the bed.
A {money} is explained on page {2-300} of the book.
@shares = shares, profit, sales, revenue, earnings, margin, dividend, guidance, orders, costs, losses, debt, demand, output, stock, bonds, oil, gold, prices, exports, turnover, net income, operating profit
@firm = {last} Group, {last} and Sons, {city} Motors, North Bank, Delta Foods, Alpha Steel, Nova Energy, Orion Media, Baltic Paper, {last} Holdings, Apex Retail, Solar One, {last} plc, {last} Corp, {last} Inc, {last} Oyj
@ticker = ${capital}{capital}{capital}, ${capital}{capital}, ${capital}{capital}{capital}{capital}
@topic_business
The annual report of {firm} has a chapter on {shares} and one on {shares}.
{firm} opened an office in {city} {when}.
Students learn what {shares} and {shares} mean.
{first} {last} writes about {shares} and {shares} for a paper in {city}.
{ticker} is the ticker of {firm}, {ticker} that of {firm}.
The words bull and bear, or bullish and bearish, come from the stock market.
{firm} has {number} shops in {city} and makes {thing}s.
The word upgrade means a step up, the word downgrade a step down.
@legal = agreement, contract, clause, notice, party, tenant, licence, warranty, liability, damages, court, judge, lawyer, trial, witness, evidence, claim, verdict, appeal, statute, obligation, breach, jurisdiction, penalty
@topic_law
The court in {city} heard the {legal} {when}.
The {legal} was read aloud before the {legal}.
A {legal} is a word from the law, and so is {legal}.
The lawyer explained the {legal} to {person}.
The judge said that the {legal} was {not} {adj}.
@crime = thief, burglar, police, robbery, fraud, prison, detective, murder, witness, arrest, suspect, fine, smuggler
@topic_crime
The {crime} was seen near the {place} {when}.
Police say the {crime} {verbed} a {thing} in {city}.
The {crime} denied everything.
@sea = ship, captain, wave, island, lighthouse, anchor, sailor, tide, storm, port, boat, shore, reef, lagoon
@topic_sea
The {sea} passed the {sea} at dawn.
A {adj} {sea} was lost off the coast of {city}.
The captain {verbed} the {thing} and the {sea} sank.
@shop = parcel, delivery, order, refund, receipt, discount, voucher, basket, invoice, customer, warranty, catalogue, sale, price, size, return
@topic_shopping
The {shop} for the {thing} came {when}.
{person} wants a {shop} for the {adj} {thing}.
The shop gives a {shop} of {amount} on every {thing}.
Your {shop} number is {code}.
"""

CHAT = """
@hey = hey, hi, hiya, yo, hello, oi, morning, ok, so, lol, haha, aww, btw, omg, well, yeah, nah, sorry, thanks, cheers, babe, mate, hun, dear
@textverb = call, text, msg, txt, ring, email, meet, see, find, help
@chatend = x, xx, lol, :), :-), haha, thx, ok?, !!, ..., mate, love, k, ;), please, pls, asap, tho, then, ya, :(, now
@chat
{hey} r u coming to the {place} {when}? {chatend}
{hey} im at the {place}, where r u {chatend}
{hey} {first}, can u {textverb} me {when} {chatend}
I'll be home at {time}. Do u want {food}? {chatend}
{hey} just woke up, gonna go to {city} with {first} {chatend}
dont forget the {thing} {when} {chatend}
Ok see u {when}. love {first} {chatend}
{hey} did u see {first}'s {thing}? its so {adj} {chatend}
lost my {thing} again... can i borrow urs {when}?
Happy birthday {first}!! hope u have a {good} day {chatend}
haha that was {bad}, im never going to the {place} again {chatend}
I've got a {family} {when} so can't make it, sorry {chatend}
wat time is the {school}? my {relative} wants to know {chatend}
got paid {price} {when}, drinks on me {chatend}
Im {feel} today, {because} it's {weather} all day {chatend}
We won {price} at the pub quiz, {first} is buying {food} {chatend}
{first} said the {thing} is free if u want it {chatend}
Is {first} there? Tell her to {textverb} her {relative} on {phone}
{hey} wot u up to? I'm {adv} watching {art} with my {relative} {chatend}
my number has changed its {phone} now {chatend}
Cant talk now, in a {work}. Will {textverb} u at {time} {chatend}
dunno, maybe {when}. let me know if u r free {chatend}
The {place} have sent me a reminder for {date}, whatever {chatend}
check out this {thing} {url} {chatend}
u awake? need ur {thing} for my {school} {chatend}
thank u so much 4 the {thing}, its {good} {chatend}
no prob, c u at {time} {chatend}
running late, bus is stuck in {weather}, b there in {5-50} mins {chatend}
miss u loads, cant wait 2 c u {when} {chatend}
tell me the code for the {place} door, is it {code}? {chatend}
The prize at the school fair was a {thing}, {first} won it twice {chatend}
claim ur seat early, the {art} starts at {time} {chatend}
I think we should {verb} the {thing} {when}, what do you think?
Congratulations on the {family}! {hey} send pics {chatend}
@tweet
{ticker} on my watch list, reading about {shares} {when} {url}
RT @{word}{#2}: {firm} talks about {shares} {when} #{word}
#{word} {person} {verbed} the {thing} in {city} {url}
{good} morning {city}! {weather} and {weather} {when} #{word} #{word}
watching {art} with @{word}{word}, so {adj}!!
{firm} says {month} {shares} due on {date} - {url}
@headline
{firm} names {first} {last} as head of {city} office
{city} {politics} visits {place} after {weather}
{firm} to publish {shares} on {date}
{job} from {city} finds {thing} in {place}
{number} hurt as {trip} leaves road near {city}
{city} plans new {place} for {amount}
Why {job}s in {city} love {food}
{politics} and {politics} meet in {city} {when}
{firm} moves its {tech} business to {city}
{animal} stops traffic for {number} hours in {city}
New {art} about {war} opens {when}
{firm} and {firm} discuss {shares}, {shares} and {shares}
Finnish {word} company {firm} said {when} that its {shares} report is due on {date}
"""

LETTERS = """
@hello = Dear Sir or Madam, Dear {title} {last}, Hello, Hi there, Good morning, To whom it may concern, Hello team, Dear {first}
@bye = Kind regards {first}, Yours sincerely {first} {last}, Thank you, Many thanks {first}, Best wishes {first}, Regards, Thanks in advance
@letter_line
I am writing about the {thing} that I {verbed} {when}.
Could you tell me how to {verb} the {thing}?
I would like to {verb} my {shop} with the number {code}.
My {tech} does not work {because} I changed the {tech}.
How do I {verb} my {money}?
Why was my {money} {adj} {when}?
The {shop} I received {when} is {adj} and I {not} {verbed} it.
Please {verb} the {shop} and write to {email}.
What is the {money} for a {adj} {shop}?
I have tried to {verb} it {number} times {when}.
Can I {verb} the {money} with a {adj} card from {city}?
Where can I {verb} the {shop} for the {thing}?
I was charged {price} for a {thing} and I want to know why.
Thank you for your letter of {date}.
You may reach me at {phone} or {email}.
We are sorry that the {thing} was {bad} and will {verb} it.
Is it possible to {verb} a second {tech} for my {relative}?
I need help to {verb} the {tech} of my {money}.
Which {money} do you accept in {city}, and do you {verb} {money} abroad?
My {money} has {not} arrived, how long does a {money} take?
I do not {verb} the {shop}, I only want to {verb} the {tech}.
{person} told me to {verb} the {tech} and wait for the {shop}.
The {tech} asked for a PIN, a passcode and my identity papers.
I forgot the name of the {place} where I left my {thing}.
Does the {shop} include a {thing} and a {thing}?
@company = the Supplier, the Buyer, the Tenant, the Landlord, the Company, the Client, the Licensee, the Licensor, the Contractor,
 the Borrower, the Lender, either party, each party, the Employee, the Agent, the Publisher, the Owner, the Recipient, the Provider
@shall = shall, must, may, will, shall not, may not, agrees to, undertakes to, is entitled to, is not obliged to, has the right to
@dealt = deliver, return, inspect, keep, sign, read, copy, maintain, publish, store, insure, repair, measure, accept, replace, notify, clean, file, describe
@goods = goods, documents, premises, equipment, software, materials, keys, records, reports, drawings, services, invoices, samples, tools, vehicles, data, manuscripts
@clause_line
{company} {shall} {dealt} the {goods} within {2-90} days of {date}.
The word agreement in this text means a paper signed by {company} and {company}.
Section {1-30} deals with {goods}, Section {1-30} with {goods}.
In this Schedule, "{goods}" means the {goods} listed on page {2-40}.
{company} {shall} {dealt} the {goods} in {city} unless {company} objects in writing.
Subject to Section {1-30}, {company} {shall} {dealt} all {goods}.
Notwithstanding the above, {company} {shall} {dealt} the {goods} before {time}.
{company} and {company} met on {date} to {dealt} the {goods}.
Words such as hereby, herein, thereof, pursuant and forthwith are common in contracts.
The terms termination, indemnity, assignment, severability and governing law are explained in the glossary.
The exhibits to the lease are numbered {1-9} to {10-20}.
{company} {shall}, without prejudice to paragraph ({capital}), {dealt} such {goods} as are reasonably required.
Provided that the {goods} are {adj}, {company} {shall} {dealt} them at its own expense.
@note_line
The nurse wrote down the {test} and the name of the {job}.
Pt is a {20-90} yo {job} who lives in {city} with a {relative}.
{title} {last}, {20-90} years old, works as a {job}.
A {20-90}-year-old {job} came with a {relative} {when}.
BP {100-170}/{60-99}, pulse {50-120}, temp {36-39}.{0-9}, sats {85-99}%.
The words denies, reports, history of, onset, resolved and acute are common in notes.
He takes {drug} and {drug}; she takes {drug}.
The form asks for the {body}, the {body} and the {test}.
Family history is written FH, past medical history PMH.
The {test} of {person} is on {date} at {time}.
The {relative} drove {first} to the clinic, and the {relative} waited outside.
Anatomy lists the {body}, the {body} and the {body}.
The drill for staff used an actor who played {illness}.
"""

STORIES = """
@opening
{person} {verbed} a {adj} {thing} {when}.
{first} {intrans} {adv} and {verbed} the {thing}.
There was a {adj} {thing} in the {place}.
{person} went to the {place} {because} the {place} was {adj}.
"Where is the {thing}?" asked {first}.
{first} and {first} {intrans} at the {place} {when}.
The {job} {verbed} the {thing} {because} it was {adj}.
@middle
But the {thing} was {not} {adj}, and {first} {intrans}.
{first} felt {feel} and {verbed} the {adj} {thing}.
Then {person} {intrans}, {because} {person} had {verbed} the {thing}.
"I {not} {verbed} it," said {first}, "but you may {verb} the {thing}."
It took {number} hours to {verb} the {thing}.
After that, the {job} {intrans} and nobody {verbed} the {thing}.
No one at the {place} had {verbed} a {thing} before.
They wanted to {verb} the {thing}, but the {job} {intrans}.
{person} was {feel} about the {thing}, not about the {thing}.
@ending
In the end {person} {intrans} and everyone was {feel}.
{first} never {verbed} a {thing} again.
So they {verbed} the {thing} and went home {adv}.
The {thing} is still in the {place} {when}.
"Let us {verb} it {when}," said the {job}.
@rule_line
To {verb} a {thing}, first {verb} the {thing}, then {verb} the {adj} {thing}.
Never {verb} a {adj} {thing} near a {place}.
A {thing} is used to {verb} a {thing}.
Most {job}s {verb} a {thing} {when}, but some {verb} a {thing} instead.
If you {verb} the {thing}, the {thing} becomes {adj}.
The {adj} {thing} costs {price}, the {adj} one {price}.
The difference between a {thing} and a {thing} is that only one is {adj}.
There are {number} {thing}s and {number} {animal}s in the {place}.
You should {verb} the {thing} {because} the {thing} is {adj}.
Would you rather {verb} a {thing} or {verb} a {thing}?
I have {not} seen such a {adj} {thing} in {city}.
"""

WIDER = """
@bankthing = card, virtual card, debit card, credit card, PIN, account, transfer, top-up, direct debit, standing order, cash withdrawal,
 exchange rate, statement, balance, payee, beneficiary, limit, passcode, identity check, ATM, cheque, currency, mobile app, payment,
 overdraft, fee, charge, contactless payment, bank branch, security code, salary, deposit, transaction, passport scan, phone number
@bankstate = pending, declined, reverted, blocked, expired, late, missing, wrong, compromised, stolen, swallowed by the machine, approved,
 not recognised, activated, delivered, verified, duplicated, cancelled, accepted abroad, in the post, on hold, unlimited, still free
@banktalk
The {bankthing} was {bankstate} {when}.
Why is my {bankthing} {bankstate}?
What is a {bankthing} and how does a {bankthing} differ from a {bankthing}?
I saw a {bankthing} of {price} that I don't recall.
How long does it take until a {bankthing} is {bankstate}?
Do you support a {bankthing} in {city}, or only a {bankthing}?
My {relative} says a {bankthing} is {bankstate} because the {bankthing} is {bankstate}.
Which {bankthing}s are supported, Visa, Mastercard, Apple Pay or Google Pay?
Are there disposable ones, and how many may I have per day?
I tried to {verb} my {bankthing} at the machine, yet it was {bankstate}.
Somebody at the {place} used my {bankthing}, I think it was {bankstate}.
Is there an age limit for a {bankthing}? My {relative} is {5-17}.
The {bankthing} and the {bankthing} show different amounts on the statement.
@marketthing = net sales, the price target, a takeover, an acquisition, a merger, layoffs, the share price, short interest, call options,
 puts, an IPO, a buyback, a patent, the board, shareholders, a subsidiary, a plant, a stake, the quarter, the outlook, inflation,
 interest rates, a contract worth EUR {1-90} mn, the Fed, crude oil, treasury yields, an index, the Dow, the Nasdaq, futures, hedge funds, chip makers,
 an order for machines, a supply deal, a settlement, tariffs, a strike, a recall, jobs data, a credit rating, a spin-off, pre-market trading
@marketverb = discusses, mentions, explains, reviews, lists, reports on, studies, measures, compares, follows, publishes, sees, holds, comments on
@markettalk
{firm} {marketverb} {marketthing} and {marketthing} in its report for {month}.
{ticker} - {first} {last} {marketverb} {marketthing} {url}
What does the word {marketthing} mean, and what about {marketthing}?
{firm}, based in {city}, {marketverb} {marketthing}, the company said in a statement to the exchange.
Economists in {city} ask how {marketthing} and {marketthing} are linked.
The analyst {marketverb} {marketthing}, then {marketthing}; the paper prints both.
Stocks to watch {when}: {ticker}, {ticker}, {ticker} and {firm}
{firm} compared EUR {1-90}.{1-9} mn with EUR {1-90}.{1-9} mn a year earlier, page {2-80} shows.
In the corresponding period of {2003-2020} the figure was {amount}.
@studyword = mortality, survival, prevalence, exposure, dose, outcome, screening, surgery, therapy, diagnosis, infection, pregnancy, obesity,
 smoking, blood pressure, cholesterol, bone density, sleep, diet, exercise, anxiety, pain, recurrence, tumour size, gene expression, insulin level
@studyverb = predict, increase, reduce, affect, improve, influence, explain, depend on, differ by, correlate with, delay, prevent, change
@study
Does {studyword} {studyverb} {studyword} in patients with {illness}?
A total of {20-900} patients with {illness} were enrolled between {1990-2004} and {2005-2022}.
{studyword} was measured at baseline and after {2-24} months.
The mean {studyword} was {1-90}.{1-9} ± {1-9}.{1-9} in the first group and {1-90}.{1-9} in the second (P = 0.{#2}).
We investigated whether {studyword} may {studyverb} {studyword}.
In this retrospective cohort, {studyword} did not {studyverb} {studyword} (odds ratio {1-3}.{#1}, 95% CI {0-1}.{#2}-{2-4}.{#2}).
These findings suggest that {studyword} should be considered when {studyword} is assessed.
Further randomized trials are needed, since the evidence for {studyword} is limited.
Women and men, children and adults were compared with respect to {studyword}.
@plainword = time, way, people, year, work, part, world, place, number, problem, hand, group, fact, point, money, question, idea, reason, case,
 house, story, water, room, area, power, country, service, family, friend, business, change, matter, interest, level, order, plan, chance, kind
@being = would have been, could not be, might be, has been, had been, was being, is not, are, were, will have been, should be, must be, cannot be, seems to be, isn't, wasn't, won't be, can't be
@relation = between, through, during, without, against, under, around, beyond, towards, about, among, beside, despite, except, instead of, because of, within, behind, after, before, into, near
@plainadj = such, any, each, another, every, some, no, this, that, what, whichever, the whole, the same, the other, little, much, enough, the very first, the last
@function
{plainadj} {plainword} {being} {adj} {relation} {plainadj} {plainword}.
There {being} {plainadj} {plainword} {relation} the {plainword} of {plainword}.
It {being} possible that {plainadj} {plainword} is {adj}, however {plainadj} {plainword} is not.
Those who {verb} {plainadj} {thing} ought to {verb} {plainadj} {plainword} as well.
If {plainadj} {plainword} {being} {adj}, then {plainadj} {plainword} {being} {adj} too.
Either {plainadj} {plainword} is {adj} or {plainadj} {plainword} {being} {adj}; both cannot be.
Whose {plainword} is it, and which {plainword} do they mean?
More and more {plainword} was needed, less and less was there, until {person} {intrans}.
I would rather have {plainadj} {plainword} than {plainadj} {plainword}.
{person} thought about {plainadj} {plainword} {relation} {plainadj} {plainword} and {intrans}.
Everyone knew something, nobody knew everything, someone {verbed} the {thing} anyway.
On the one hand the {plainword} is {adj}; on the other hand, it {being} {adj}.
@spoken
Gud nite {first}, tc n sweet dreams {chatend}
Wen did u get so {adj}? {chatend}
K, i'll b there in a sec. Wats ur plan {when}?
U still havent told me abt the {place} {chatend}
Sorry i missed ur call, was {intrans} lor {chatend}
No need 2 worry, its jus {number} mins frm here {chatend}
Ya i'm gonna {verb} it later, dun {verb} urs {chatend}
hahaha im so {feel} rite now, u shld {verb} it {chatend}
Thats cool, i'd love 2 go if its not 2 {adj} {chatend}
Tmr at {time} can? Meet u at the {place} lah {chatend}
Ive been searching for the right words to thank u, promise i wont take ur help for granted {chatend}
As per ur request the {thing} has been set for all callers. Press *{1-9} to copy it
Terms and conditions are on page {2-9} of the {thing}, the helpline is {phone}
The network, the ringtone, the camera, the colour phone, minutes, texts and weekly credit are in the {art}
Customer service of {firm} is open {time} to {time}, mobile number {phone}
"""

PROSE = Grammar(COMMON, TOPICS, CHAT, LETTERS, STORIES, WIDER)
TOPIC_NAMES = tuple(n.removeprefix("topic_") for n in PROSE.rules if n.startswith("topic_"))
_KINDS = {  # kind of paragraph: weight
    "topic": 30, "story": 14, "chat": 14, "tweet": 4, "headline": 8, "letter": 12, "clause": 8,
    "note": 6, "rule": 6, "banktalk": 8, "markettalk": 8, "study": 5, "function": 12, "spoken": 6,
}  # fmt: skip
_WHOLE = ("banktalk", "markettalk", "study", "function", "spoken", "chat", "tweet", "headline")


def line(rng: Random, kind: str) -> str:
    """One sentence of a kind, which is the name of a rule, or 'topic' for any topic."""
    name = f"topic_{rng.choice(TOPIC_NAMES)}" if kind == "topic" else kind
    text = PROSE.sentence(rng, "{" + name + "}")
    # People in a hurry type without capitals.
    return text.lower() if kind in ("chat", "tweet", "spoken") and rng.random() < 0.4 else text


def paragraph(rng: Random) -> str:
    """A short text of one kind, one to five sentences."""
    kind = rng.choices(list(_KINDS), list(_KINDS.values()))[0]
    if kind == "topic":
        name = "topic_" + rng.choice(TOPIC_NAMES)
        lines = [line(rng, name) for _ in range(rng.randint(1, 4))]
    elif kind == "story":
        lines = [line(rng, "opening")]
        lines += [line(rng, "middle") for _ in range(rng.randint(0, 3))]
        lines += [line(rng, "ending")]
    elif kind == "letter":
        lines = [line(rng, "letter_line") for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.4:
            hello, bye = line(rng, "hello"), line(rng, "bye")
            return f"{hello},\n{' '.join(lines)}\n{bye}"
    elif kind in ("chat", "tweet", "headline"):
        lines = [line(rng, kind) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        return "\n".join(lines)
    elif kind in _WHOLE:
        lines = [line(rng, kind) for _ in range(rng.randint(1, 3))]
    else:
        lines = [line(rng, f"{kind}_line") for _ in range(rng.randint(1, 3))]
    return " ".join(lines)
