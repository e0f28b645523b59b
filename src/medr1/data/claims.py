"""Whether a reply claims to see something: known phrases in its reasoning, each with an example, by language.

"The image shows a cyst", "a cyst is seen", "hypoechoic", "in the upper left" claim to see. What denies ("no cyst is
seen": that is to see nothing), speaks in general ("a cyst typically shows …"), supposes ("if the image showed …"), or
tells the task ("the question asks what is seen") does not, and neither does what stands in quotation marks, ends in a
question mark, or repeats the question. A claim is taken by its words: whether it is true, no table can tell.

As in `medr1.data.phrases`, each line is an example and the phrases that fit into it at {p}; `test_claims.py` tries all.
"""

import re

from medr1.data.phrases import ASSURES, Lines, phrase_at, split, tree, words_of

SEES: Lines = {  # claims by itself, and begins a clause after a comma
    "Here {p} a dark lesion.": (
        "i see | i can see | i clearly see | we see | we can see | one sees | one can see | you can see | i observe"
        " | i can observe | we observe | we can observe | i notice | we notice | i can make out | i can identify"
        " | we can identify | i spot"
    ),
    "No cyst is seen, {p} a lesion.": "i see | we see",
}
SEEN: Lines = {  # claims by itself
    "A dark lesion is {p} here.": (
        "seen | visible | visualized | visualised | observed | depicted | discernible | recognisable | recognizable"
    ),
    "There is a lesion {p} corner.": (
        "at the upper | in the upper | at the lower | in the lower | at the top | in the top | at the bottom"
        " | in the bottom"
    ),
    "There is a lesion {p}.": (
        "on the left side | on the right side | at the left | at the right | at the centre | at the center"
    ),
    "Hier {p} eine Läsion.": "sehe ich | ich sehe | man sieht | sieht man | wir sehen | erkennt man | ich erkenne",
    "Eine Läsion ist {p}.": "zu sehen | sichtbar | zu erkennen | erkennbar | auf dem bild | im bild | in der aufnahme",
    "Ici {p} une lésion.": "je vois | on voit | nous voyons | on observe | j'observe | on distingue",
    "Une lésion est {p}.": "visibles | sur l'image | sur le cliché | sur cette image",
    "Aquí {p} una lesión.": "veo | vemos | observo | observamos | se ve | se observa | se observan | se aprecia",
    "La lesión está {p}.": "en la imagen | en esta imagen | en la radiografía",
    "Aqui {p} uma lesão.": "vejo | vê-se | observa-se | nota-se",
    "A lesão está {p}.": "visível | visíveis | na imagem | nesta imagem | na radiografia",
    "Здесь {p} образование.": "видно | видна | виден | видны | вижу | визуализируется | мы видим",
    "Образование лежит {p}.": "на снимке | на изображении | на рентгенограмме",
    "此处{p}肿块。": "可见 | 可以看到 | 看到 | 能看到 | 看见 | 可以看见",
    "ここに腫瘤が{p}。": (
        "見える | 見えます | 見られる | 見られます | 認める | 認めます | 認められる | 認められます | 写っている"
        " | 写っています | 確認できます"
    ),
    "종괴가 {p}.": "보입니다 | 보인다 | 관찰됩니다 | 관찰된다 | 확인됩니다 | 나타납니다",
}
AT: Lines = {  # with POINTS and IMAGES or SCANS after it, and nothing denied in the clause
    "A dark lesion lies {p} the image.": "in | on | within | inside",
    "{p} the image, it is a cyst.": (
        "from | based on | looking at | examining | upon examining | inspecting | reviewing | judging by | according to"
        " | considering | given"
    ),
}
LOOKS: Lines = {  # how something looks, where POINTS says that it is this one, or an article at most one word before it
    "There is a {p} area.": (
        "hyperintense | hypointense | isointense | hyperdense | hypodense | isodense | hyperattenuating"
        " | hypoattenuating | hyperechoic | hypoechoic | isoechoic | anechoic | echogenic | radiolucent | radiopaque"
        " | hyperreflective | hyporeflective | ring-enhancing | ground-glass | ill-defined | well-circumscribed"
    ),
}
POINTS: Lines = {
    "{p} lesion is hypodense.": "the | this | its",
    "{p} a round and hypodense lesion.": "there is | there's",
    "{p} hypodense lesions.": "these | there are",
}
IMAGES: Lines = {  # what shows something, with a verb of SHOWS after it
    "The {p} shows a dark lesion.": (
        "image | images | picture | photo | photograph | scan | scans | radiograph | sonogram | slide | smear | slice"
        " | slices | film | angiogram | mammogram | micrograph | figure"
    ),
    "Das {p} zeigt eine Läsion.": "bild | foto | röntgenbild | ct-bild | mrt-bild",
    "Die {p} zeigt eine Läsion.": "aufnahme | röntgenaufnahme",
    "Cette {p} montre une lésion.": "radiographie | photographie | échographie",
    "{p} montre une lésion.": "l'image | le cliché | le scanner | l'irm | l'échographie",
    "La {p} muestra una lesión.": "imagen | radiografía | tomografía | ecografía | resonancia | fotografía",
    "A {p} mostra uma lesão.": "imagem | radiografia | tomografia | ultrassonografia | fotografia",
    "Это {p} показывает образование.": "изображение | снимок | рентгенограмма | фото",
    "该{p}显示肿块。": "图像 | 图片 | 影像 | 照片 | 图",
    "この{p}は腫瘤を示す。": "画像 | 写真",
    "이 {p} 종괴를 보여줍니다.": "이미지는 | 영상은 | 사진은 | 이미지가 | 영상이 | 사진이",
}
SCANS: Lines = {  # the same, where POINTS or an article stands before it: "CT shows bone" is about all of them
    "The {p} shows a dark lesion.": "ct | mri | x-ray | ultrasound | oct | dermoscopy | fundus | imaging",
}
THINGS: Lines = {  # show something too, or look like it, where POINTS or an article stands before them
    "The dark {p} shows an irregular border.": (
        "lesion | lesions | mass | nodule | nodules | tumor | tumour | opacity | shadow | cell | cells | tissue"
        " | structure | area | region | border | borders | vessel | vessels | organ"
    ),
}
APPEARS: Lines = {
    "The lesion {p} dark.": "appears | appear | looks | look",
}
SHOWS: Lines = {
    "The image {p} a dark lesion.": (
        "shows | show | reveals | reveal | demonstrates | demonstrate | displays | display | depicts | depict"
        " | exhibits | contains | features | showed | revealed | demonstrated | has | is of"
    ),
    "Das Bild {p} eine Läsion.": "zeigt | zeigen",
    "L'image {p} une lésion.": "montre | montrent | révèle",
    "La imagen {p} una lesión.": "muestra | muestran | revela | presenta",
    "A imagem {p} uma lesão.": "mostra | mostram | apresenta",
    "Снимок {p} образование.": "показывает | демонстрирует",
    "图像{p}肿块。": "显示 | 示 | 表现为",
    "画像は腫瘤を{p}。": "示す | 示しています | 示している",
    "영상은 종괴를 {p}.": "보여줍니다 | 보여준다 | 나타냅니다",
}
DENIES: Lines = {  # a claim after it in its clause, or just before it
    "It is {p} true that a lesion is seen.": "not | never | hardly",
    "{p} lesion is seen.": "no | none | neither | without a sign that a",
    "A lesion {p} be seen.": "cannot | can't | couldn't | won't | wouldn't",
    "A lesion {p} seen.": "isn't | wasn't | aren't | weren't",
    "The image {p} show a lesion.": "doesn't | didn't | fails to | failed to",
    "I {p} see a lesion.": "don't | am unable to",
    "The image shows {p}.": "nothing | neither",
    "Das Bild zeigt {p} Läsion.": "keine | keinerlei | nicht eine",
    "Das Bild zeigt {p}.": "nichts | keinen befund",
    "Sur l'image {p} on voit une lésion.": "jamais | ne | pas",
    "L'image montre {p}.": "aucune lésion | aucun nodule | rien",
    "La imagen {p} muestra una lesión.": "nunca | tampoco",
    "La imagen muestra {p}.": "ninguna lesión | ningún nódulo | nada",
    "A imagem {p} mostra uma lesão.": "não",
    "A imagem mostra {p}.": "nenhuma lesão | nenhum nódulo",
    "{p} образование видно.": "не | ни | нет",
    "{p}可见肿块。": "不 | 未 | 没有 | 无法",
    "종괴가 {p} 보입니다.": "안",
}
SUPPOSES: Lines = {  # a claim after it in its clause: in general, in another case than this one, or still to be found
    "A cyst is {p} seen as a dark area.": (
        "typically | usually | often | commonly | classically | generally | frequently | sometimes | normally"
        " | characteristically | always | in general | in most cases"
    ),
    "A cyst {p} be seen as a dark area.": (
        "would | could | might | may | should | must | has to | needs to | tends to | is expected to | is known to"
    ),
    "{p} the image shows a lesion.": (
        "if | whether | unless | suppose | assume | assuming | imagine | we are asked what | it asks what"
        " | the question is what | the question is which part of | option · says that | the options say that"
    ),
    "We are {p} what is seen.": "asked | being asked",
    "The {p} what is seen.": "question asks | question is | task is to find",
    "I {p} look at what is seen.": "need to | have to | want to | am asked to | must",
    "{p} us look at what is seen.": "let",
    "{p} zeigt das Bild eine Läsion.": "typischerweise | meist | oft | häufig | normalerweise | in der regel",
    "{p} das Bild zeigt eine Läsion.": "ob | wenn | falls | gefragt ist , was | die frage ist , was",
    "{p} l'image montre une lésion.": (
        "généralement | souvent | typiquement | habituellement | si | la question est ce que"
    ),
    "{p} la imagen muestra una lesión.": "generalmente | a menudo | típicamente | normalmente | la pregunta es qué",
    "{p} a imagem mostra uma lesão.": "geralmente | frequentemente | tipicamente | a pergunta é o que",
    "{p} снимок показывает образование.": "обычно | часто | как правило | если | вопрос в том , что",
    "{p}图像显示肿块。": "通常 | 一般 | 往往 | 如果 | 若 | 是否 | 问题是 | 请问",
    "{p}画像に腫瘤が見られます。": "通常 | 一般的に | しばしば | もし | 質問は | 問題は",
    "{p} 종괴가 보입니다.": "일반적으로 | 보통 | 대개 | 종종 | 만약 | 질문은",
}
BEGINS: Lines = {  # a clause, which nothing before it denies or supposes
    "No cyst is seen, {p} a dark lesion is visible.": (
        "but | however | yet | instead | although | though | whereas | while | on the other hand"
    ),
    "It is not a cyst {p} the image shows a dark lesion.": "because | since | so | therefore | as there",
    "No cyst is seen {p} dark lesion is visible.": "and a | and the | and one | as the | as a",
    "Keine Zyste, {p} das Bild zeigt eine Läsion.": "aber | sondern | jedoch | denn",
    "Pas un kyste, {p} l'image montre une lésion.": "mais | car | cependant | parce que",
    "No es un quiste, {p} la imagen muestra una lesión.": "sino que | pero | porque",
    "Não é um cisto, {p} a imagem mostra uma lesão.": "mas | pois | porém",
    "Это не киста, {p} снимок показывает образование.": "а | но | однако | потому что | так как",
    "不是囊肿，{p}图像显示肿块。": "但 | 而 | 因为 | 但是",
    "通常は囊胞です。{p}腫瘤が見られます。": "しかし",
    "낭종이 안 보입니다. {p} 종괴가 보입니다.": "하지만 | 그러나",
}
SUBJECTS: Lines = {  # begin a clause where they follow a comma
    "No cyst is seen, {p} dark lesion is visible.": "a | another | some",
    "Keine Zyste, {p} Läsion ist sichtbar.": "die | eine | diese",
    "Jamais de kyste, {p} lésion sur l'image.": "la | une | cette",
    "Nunca un quiste, {p} lesión se ve.": "esta | una",
    "Não há cisto, {p} lesão é visível.": "esta | uma",
}

TABLES: dict[str, Lines] = {
    "w": ASSURES, "N": DENIES, "G": SUPPOSES, "b": BEGINS, "I": SEES, "E": SEEN, "R": AT, "M": IMAGES, "X": SCANS,
    "O": THINGS, "V": SHOWS, "A": APPEARS, "L": LOOKS, "s": SUBJECTS, "T": POINTS,
}  # fmt: skip
"""By the character that a phrase becomes. Where a phrase stands in two tables, the first of them counts."""

_TREE = tree(TABLES)
_SIGNS = {**dict.fromkeys(".。…!！;；，\n", "."), **dict.fromkeys("?？", "?"), ",": ","}
_CLAIM = re.compile(r"[IE]|(?:M|[Ts][^,]{0,2}[XO])[^,]{0,5}?[VA]|T[^,]{0,6}?L|sw?L")
_PLACE = re.compile(r"R[Ts][^,]{0,2}[MX]")
_REASONING = re.compile(r"<answer>.*?(?:</answer>|$)|</?think>", re.DOTALL)
_QUOTED = re.compile(r"\"[^\"\n]*\"|[“”„«»「」『』][^“”„«»「」『』\n]*[“”«»「」『』]|(?<!\w)['‘][^'’\n]*['’](?!\w)")


def claims_to_see(reply: str, question: str = "") -> bool:
    """Whether a reply, its answer tags left out, claims to see something.

    Args:
        question: is no claim where the reply repeats it.
    """
    text = _REASONING.sub("\n", reply.replace("’", "'"))
    if question.strip():
        text = re.sub(re.escape(question.strip()), "?", text, flags=re.IGNORECASE)
    return any(map(_claims, _clauses(_QUOTED.sub(" ", text))))


def _clauses(text: str) -> list[str]:
    """The clauses of a text, a character a phrase or word of it; without questions."""
    pieces = list(split(text))
    words, found, position = words_of(pieces), "", 0
    while position < len(pieces):
        character, length = phrase_at(_TREE, words, position)
        if not length:
            piece = pieces[position]
            character = _SIGNS.get(piece.text, "." if piece.text[0] == "." else "w")
        found += character
        position += max(1, length)
    sentences = [sentence for sentence in re.findall(r"[^.?]*[.?]?", found) if not sentence.endswith("?")]
    return [clause for sentence in sentences for clause in re.split(r"(?=b)|(?<=,)(?=[sTMI])", sentence)]


def _claims(clause: str) -> bool:
    if (place := _PLACE.search(clause)) and "N" not in clause and "G" not in clause[: place.end()]:
        return True
    return any(
        not re.search("[NG]", clause[: claim.end()]) and not clause[claim.end() :].startswith("N")
        for claim in _CLAIM.finditer(clause)
    )
