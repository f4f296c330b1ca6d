"""Four wordings of the instruction of each task."""

from __future__ import annotations

PROMPTS: dict[str, tuple[str, str, str, str]] = {
    "visualnews_task0": (
        "Search for the news photograph, without text, that this caption tells of.",
        "Which press photo shows what the sentence reports? Return the photo alone.",
        "Get the bare news picture that fits this report.",
        "Given a line from the news, look up the photograph it was written for.",
    ),
    "mscoco_task0": (
        "Search for the plain everyday picture that this caption tells of.",
        "Which snapshot shows what the sentence says? Return the picture alone.",
        "Get the bare everyday image that fits this description.",
        "Given a caption of daily life, look up the picture it was written for.",
    ),
    "fashion200k_task0": (
        "Search for the garment picture that this shop text describes.",
        "Which product photo shows the piece in the text? Return the photo alone.",
        "Get the bare picture of clothing that fits this product text.",
        "Given the wording of a catalogue, look up the photo of the garment.",
    ),
    "webqa_task1": (
        "Search for the encyclopaedia passage, text only, that answers this question.",
        "Which written fact settles the question? Return the passage alone.",
        "Get the text paragraph that holds the answer.",
        "Given a question, look up the passage of plain text that replies to it.",
    ),
    "edis_task2": (
        "Search for the news card, photo with headline, that this caption tells of.",
        "Which photo together with its headline reports the event? Return both.",
        "Get the news picture and headline that belong to this report.",
        "Given a line from the news, look up the pictured article with its headline.",
    ),
    "webqa_task2": (
        "Search for the encyclopaedia card, picture with caption, that answers this question.",
        "Which captioned picture settles the question? Return picture and caption.",
        "Get the picture and its caption that hold the answer.",
        "Given a question, look up the captioned picture that replies to it.",
    ),
    "visualnews_task3": (
        "Search for the caption, text only, of this news photograph.",
        "Which sentence from the news tells what the photo shows? Return the sentence.",
        "Get the written news line that fits this picture.",
        "Given a press photo, look up the words printed under it.",
    ),
    "mscoco_task3": (
        "Search for a caption, text only, of this everyday picture.",
        "Which sentence tells what the snapshot shows? Return the sentence.",
        "Get the written description that fits this everyday image.",
        "Given a picture of daily life, look up the words that describe it.",
    ),
    "fashion200k_task3": (
        "Search for the shop text, words only, of the garment in this picture.",
        "Which product text describes the piece in the photo? Return the text.",
        "Get the written catalogue line that fits this clothing.",
        "Given the photo of a garment, look up its wording in the catalogue.",
    ),
    "nights_task4": (
        "Search for another everyday picture that shows the same as this one.",
        "Which other snapshot looks alike? Return the picture alone.",
        "Get the bare image that comes closest to this image.",
        "Given a picture, look up a second picture of the same scene.",
    ),
    "oven_task6": (
        "Search for the passage, text only, that names what this picture shows.",
        "Which paragraph says what the pictured thing is called? Return the paragraph.",
        "Get the written entry that names the subject of the photo.",
        "Given a picture and a question about its name, look up the plain text entry.",
    ),
    "infoseek_task6": (
        "Search for the passage, text only, with the fact asked about this picture.",
        "Which paragraph answers the question on the pictured thing? Return the paragraph.",
        "Get the written fact that settles the question on the photo.",
        "Given a picture and a question of detail, look up the plain text fact.",
    ),
    "fashioniq_task7": (
        "Search for the garment picture that this one becomes after the change.",
        "Which product photo agrees with the picture and the wish? Return the photo.",
        "Get the bare picture of the clothing once the note is followed.",
        "Given a garment and a wish for change, look up the photo of the new piece.",
    ),
    "cirr_task7": (
        "Search for the everyday picture that this one becomes after the change.",
        "Which snapshot agrees with the picture and the edit? Return the picture alone.",
        "Get the bare image of the scene once the note is followed.",
        "Given an everyday picture and an edit, look up the picture of the new scene.",
    ),
    "oven_task8": (
        "Search for the illustrated entry, picture with text, that names what this picture shows.",
        "Which picture with passage says what the thing is called? Return both.",
        "Get the pictured entry that names the subject of the photo.",
        "Given a picture and a question about its name, look up the entry with its picture.",
    ),
    "infoseek_task8": (
        "Search for the illustrated fact, picture with text, asked about this picture.",
        "Which picture with passage answers the question on the pictured thing? Return both.",
        "Get the pictured fact that settles the question on the photo.",
        "Given a picture and a question of detail, look up the fact with its picture.",
    ),
}
