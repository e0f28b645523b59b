"""Claims to see: every phrase of every table in its example, and what sounds like a claim and is none."""

import pytest

from medr1.data.claims import TABLES, claims_to_see
from medr1.data.phrases import phrases

CLAIMS = (
    "In the provided CT image, the liver is enlarged.",
    "Based on the given picture, this is a cyst.",
    "Upon examining the image, it must be a melanoma.",
    "The lesion appears dark and has an irregular border.",
    "The image appears to be an MRI.",
    "The picture looks like a smear of blood.",
    "This slide depicts red cells.",
    "The structure in the image is the heart.",
    "The image is CT and shows the Abdomen. There is a Mild Cyst at the Upper right.",
    "The image shows a large mass in the liver.",
    "This chest X-ray demonstrates a right-sided pleural effusion.",
    "I can see an irregular dark border, so this is melanoma.",
    "Looking at the image, the structure is round.",
    "A hypoechoic nodule with irregular margins.",
    "There is a well-circumscribed hyperintense lesion in the left temporal lobe.",
    "The dark spot visible in the upper left suggests drusen.",
    "No fracture is seen, but a large effusion is visible.",
    "It cannot be a cyst because the image shows solid tissue.",
    "There is no doubt the image shows a cyst.",
    "In the image, the macula is thickened.",
    "Das Bild zeigt keine Zyste, aber eine Läsion ist sichtbar.",
    "未见骨折，可见肿块。",
    "The provided image appears to be an MRI scan and it shows a bright ring.",
    "The red-stained cells are clearly visible.",
    "As seen in the image, the optic disc is swollen.",
    "We can observe thickening of the retinal layers.",
)
NO_CLAIMS = (
    "A cyst is anechoic.",
    "From the image it cannot be determined.",
    "The answer is not in the image.",
    "I take the view that the answer is B.",
    "The question has three options.",
    "In the options, the cyst is the first.",
    "There is no visible fracture.",
    "I don't see a fracture.",
    "Let me look at the image.",
    "The lesion does not appear dark.",
    "In general the image shows little.",
    "No lesion shows a border.",
    "The image is not needed to answer this.",
    "The image is irrelevant here.",
    "I do not need the image.",
    "I cannot see the image.",
    "No image is visible.",
    'The question asks "what is seen in the image?" and the answer is CT.',
    "The question asks what the image shows.",
    "What does the image show?",
    "'The image shows a cyst' is what option A says.",
    "Melanoma typically shows irregular borders in the image.",
    "Cysts are usually anechoic.",
    "A cyst is usually seen as a dark area.",
    "If the image showed a cyst, I would choose B.",
    "No effusion, mass, or fracture is seen.",
    "The image does not show a fracture.",
    "The image shows no fracture.",
    "I see no nodule.",
    "Without seeing the image, I guess B.",
    "CT shows bone as white.",
    "MRI has high contrast.",
    "The answer is B.",
    "Option B is the most likely, since drusen are common.",
    "I need to look at what is seen in the image.",
    "Let me see whether the image shows a cyst.",
    "The correct answer cannot be told from the image.",
    "Based on the options, it is A.",
    "Nothing is visible.",
    "The lesion is not visible in the image.",
    "The image could show anything.",
    "I am on the right track.",
    "An image of the chest is needed.",
    "Das Bild zeigt keine Läsion.",
    "L'image n'est pas nécessaire.",
    "图像未显示骨折。",
    "The image was not provided.",
    "We are asked which organ is shown in the image.",
    "The question is which structure is visible in the picture.",
    "I don't see any image attached.",
    "Unable to view the image.",
    "Drusen are commonly seen in the macula.",
    "This is a question about the image.",
)
KNOWN_FAULTS = (  # taken for claims: nothing in them says that they speak of all cysts
    "Cysts are seen in older patients.",
)

CLAIMING = "bIEMXVROALsT"
DENYING = "NG"


@pytest.mark.parametrize("table", CLAIMING + DENYING)
def test_each_phrase_does_what_its_table_says(table: str) -> None:
    wrong = []
    for example, phrase in phrases(TABLES[table]):
        text = example.format(p=phrase.replace(" ,", ",").replace("·", "b"))
        text = text[:1].upper() + text[1:]
        if claims_to_see(f"<think>{text}</think><answer>A</answer>") != (table in CLAIMING):
            wrong.append(text)
    assert not wrong, f"{len(wrong)}: {wrong[:40]}"


@pytest.mark.parametrize("text", CLAIMS)
def test_a_claim_is_recognised(text: str) -> None:
    assert claims_to_see(f"<think>{text}</think><answer>B</answer>")
    assert claims_to_see(f"<answer>B</answer><think>{text}</think>")
    assert not claims_to_see(f"<answer>{text}</answer>")  # an option's text is what was offered
    assert not claims_to_see(f'The question reads "{text}". It is B.')


@pytest.mark.parametrize("text", NO_CLAIMS)
def test_what_sounds_like_a_claim_is_none(text: str) -> None:
    assert not claims_to_see(f"<think>{text}</think><answer>B</answer>")


def test_known_faults_of_the_table_stay_known() -> None:
    assert all(map(claims_to_see, KNOWN_FAULTS))


def test_a_question_that_is_repeated_is_no_claim() -> None:
    question = "Name the organ that is seen in the image."
    assert claims_to_see(f"{question} It is the liver.")
    assert not claims_to_see(f"{question} It is the liver.", question)
    assert claims_to_see(f"{question} The image shows the liver.", question)


@pytest.mark.parametrize("text", ["", "<think></think>", "<think>", "…", "?" * 3_000, "the image " * 3_000])
def test_any_text_is_read(text: str) -> None:
    assert not claims_to_see(text)
