"""The words that the extractor knows, in tables: what declares, accepts, denies, retracts and hedges, by language.

Each line is an example and the phrases that fit into it at {p}. {y} is what the example says, {x} what it mentions and
does not mean; an example without {y} says nothing. So every phrase has its test (`test_phrases.py` tries them all, with
each letter and with option texts), and a phrase without one cannot be written down.

A phrase is a sequence of words and signs as `split` parts them; case, and where they stand, make no difference.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from medr1.data.option_texts import CJK, LOWER_TEXT, TEXT, WEAK_TEXT

Lines = dict[str, str]
"""Phrases, parted by " | ", by their example."""

CUES: Lines = {  # what an answer is called: with a verb or a colon after it, it declares one
    "{x} shows less. The {p} is {y}.": (
        "answer | answer choice | option | choice | letter | response | selection | solution"
        " | guess | pick | verdict | conclusion | prediction | label | ans | right one | correct one | best one"
    ),
    "{x} shows less. The final {p}: {y}": "diagnosis | impression | judgement | judgment",
    "{x} zeigt weniger. {p}: {y}": "antwort | lösung | buchstabe | auswahl",
    "{x} montre moins. {p} : {y}": "réponse | lettre | choix | l'option | l'alternative | la réponse",
    "{x} muestra menos. {p}: {y}": "respuesta | opción | letra | alternativa",
    "{x} mostra menos. {p}: {y}": "resposta | opção",
    "{x} меньше. {p}: {y}": "ответ | вариант | буква | вариант ответа",
    "{x}较少。{p}：{y}": "答案 | 选项 | 正确答案 | 最终答案 | 正确选项 | 回答",
    "{x}は少ない。{p}：{y}": "答え | 正解 | 正答 | 選択肢 | 解答",
    "{x} 적다. {p}: {y}": "정답 | 답 | 답안 | 선택지 | 보기",
}
CUES_TO: Lines = {  # what may stand between that and its verb
    "{x} shows less. {p} this question is {y}.": (
        "the answer to | the correct answer to | the best answer to | my answer to | the answer for"
        " | the answer to whether"
    ),
    "{x} shows less. The {p} this question is {y}.": "answer to | answer for | choice for | response to",
}
DECLARES: Lines = {
    "{x} shows less. {p} {y}.": (
        "i choose | i chose | i pick | i select | i selected | i would choose | i'd choose | i would pick"
        " | i'd pick | i would select | i'd select | i will choose | i'll choose | i go with | i would go with"
        " | i'd go with | i will go with | i'll go with | i'm going with | i am going with | i go for"
        " | i'd go for | i vote for | i opt for | i would opt for | i settle on | i'll take | i would say"
        " | i'd say | i would answer | will go with | pick | choose | select"
        " | go with | let's go with | my money is on | i favor | i favour | i lean towards | i lean toward"
        " | i'm leaning towards | i am leaning towards"
    ),
    "{x} zeigt weniger. {p} {y}.": "ich wähle | ich würde sagen | ich nehme | ich entscheide mich für | ich würde",
    "{x} montre moins. {p} {y}.": "je choisis | je dirais | je sélectionne | j'opte pour",
    "{x} muestra menos. {p} {y}.": "elijo | yo elegiría | yo diría | diría | escojo | selecciono | me quedo con",
    "{x} mostra menos. {p} {y}.": "escolho | eu escolheria | eu diria | diria | seleciono",
    "{x} меньше. {p} {y}.": "я выбираю | выбираю | я бы выбрал | я бы сказал",
    "{x}较少。{p}{y}。": "我选 | 我选择 | 应选 | 应该选 | 应选择 | 应该选择 | 故选 | 选择 | 选",
    "{x}较少，{p}{y}。": "答案是 | 答案为 | 答案应为",
    "{x}は少ない。{p}{y}です。": "答えは | 正解は | 正答は | 回答は | 解答は",
    "{x} 적다. {p} {y}입니다.": "정답은 | 답은 | 답안은",
}
PREFERS: Lines = {  # declares too; what "to" compares with it is not meant
    "{p} {y} to {x}": "i prefer | i would prefer",
}
STATES: Lines = {  # says what is there, with less weight than a declared answer
    "{x} shows less. {p} {y}.": (
        "it is | it's | this is | that is | these are | there is | there's | there is also | there's also"
        " | there are | i think | i think it is"
        " | i think it's | i believe | i believe it is | i suspect | i guess | i count | i see | consistent with"
        " | compatible with | suggestive of | typical of | typical for | characteristic of | diagnostic of"
        " | suggest | indicate | suggesting | indicating | which suggests | which indicates | corresponds to"
        " | looks like | most likely | likely"
        " | probably | most probably | presumably | certainly | clearly | definitely | it must be | must be"
        " | it should be | which is | namely | ie | leaving | leaves | diagnosis is | the image is"
        " | the image shows | the scan shows | the picture shows | modality is | it looks like | it seems to be"
        " | it appears to be | undoubtedly | obviously | evidently | left with | the findings favor | point to"
        " | point towards"
    ),
    "{x} zeigt weniger. {p} {y}.": "es ist | das ist | es handelt sich um | wahrscheinlich | vermutlich",
    "{x} montre moins. {p} {y}.": "c'est | il s'agit de | je pense que c'est | je crois que c'est | probablement",
    "{x} muestra menos. {p} {y}.": "creo que es | pienso que es | se trata de | probablemente | parece ser",
    "{x} mostra menos. {p} {y}.": "acho que é | creio que é | trata-se de | provavelmente",
    "{x} меньше. {p} {y}.": "это | думаю , что | я думаю , что это | вероятно | скорее всего",
    "{x}较少。{p}{y}。": "是 | 这是 | 应该是 | 我认为是 | 显示 | 提示 | 为 | 考虑 | 考虑为",
    "{x}は少ない。{p}{y}です。": "これは | おそらく",
    "{x} 적다. {p} {y}입니다.": "이것은 | 아마도",
}
INFERS: Lines = {  # the same, of what is absent too
    "The absence of bright bone {p} {y}.": (
        "suggests | indicates | implies | points to | points towards | favors | favours"
    ),
}
CONCLUDES: Lines = {
    "{x} shows less. {p}, {y}.": (
        "so | therefore | thus | hence | consequently | accordingly | in conclusion | in summary | overall"
        " | to conclude | to sum up | ergo | this leaves | finally | ultimately"
    ),
    "I cannot tell, but {p}, {y}.": (
        "if i had to guess | if i had to choose | if i had to pick | if i must choose | if i must guess"
        " | if i were to guess | if i were to choose | if forced to choose | if forced to guess | if pressed"
    ),
    "{x} zeigt weniger. {p} {y}.": "daher | deshalb | folglich | somit",
    "{x} montre moins. {p} {y}.": "donc | par conséquent | ainsi",
    "{x} muestra menos. {p} {y}.": "por lo tanto | por tanto | así que | entonces | en conclusión",
    "{x} mostra menos. {p} {y}.": "portanto | logo | em conclusão",
    "{x} меньше. {p} {y}.": "поэтому | следовательно | итак | значит | таким образом",
    "{x}较少。{p}{y}。": "所以 | 因此 | 故 | 综上",
    "{x}は少ない。{p}{y}です。": "したがって | よって | だから",
    "{x} 적다. {p} {y}입니다.": "따라서 | 그러므로",
}
FINAL: Lines = {
    "Answer: {x}\n{p} answer: {y}": "final | revised | updated | corrected | amended",
}
ACCEPTS: Lines = {
    "{y} is {p}. {x} shows less.": (
        "correct | true | best | the answer | the correct answer | the right answer | the best answer"
        " | my answer | the correct option | the right option | the best option | the correct choice"
        " | the right choice | my choice | the best choice | the correct one | the right one | the best fit"
        " | the best match | the most likely | most likely | the most likely diagnosis | the most likely answer"
        " | the most probable | the most plausible | preferred | favored | favoured | the diagnosis | accurate"
        " | the most appropriate | the one | the better choice | the better answer | the better option"
        " | the better fit | a better fit | the better match"
    ),
    "{y} {p}. {x} shows less.": "is better | makes more sense | makes the most sense | fits best | matches best",
    "- {y}: {p}\n- {x}: wrong": "✓ | ✔ | ✅ | ☑",
    "{y} ist {p}. {x} zeigt weniger.": "richtig | korrekt | die richtige antwort | die korrekte antwort",
    "{x}: no\n{y}: {p}": "yes",
    "{y} {p}. {x} zeigt weniger.": "trifft zu | stimmt",
    "{y} est {p}. {x} montre moins.": "correct | correcte | juste | vrai | exact | exacte | la bonne réponse",
    "{y} es {p}. {x} muestra menos.": "correcta | correcto | la correcta | la respuesta correcta | verdadera",
    "{y} é {p}. {x} mostra menos.": "correta | correto | certa | certo | a correta | a certa | a resposta correta",
    "{y} – {p}. {x} меньше.": "верно | правильно | правильный | верный | правильный ответ",
    "{y}{p}。{x}较少。": "正确 | 是对的 | 是正确的 | 是正确答案 | 为正确答案 | 是正确选项",
    "{y}が{p}。{x}は少ない。": "正解 | 正しい | 正解です | 正しいです | 適切",
    "{y}가 {p}. {x} 적다.": "정답입니다 | 정답이다 | 맞습니다 | 옳습니다 | 정답",
}
RIGHT: Lines = {  # accepts as ACCEPTS do, where it is no side
    "{y} is {p}. {x} shows less.": "right",
}
REJECTS: Lines = {  # of what stands before
    "{x} is {p}. It is {y}.": (
        "wrong | incorrect | false | not seen | not visible | negative | unlikely | improbable | implausible"
        " | impossible | excluded | ruled out"
        " | eliminated | rejected | absent | less likely | less probable | less plausible | less typical"
        " | less consistent | inconsistent | out of the question | inappropriate | not correct | not right"
        " | not likely | not present | not the answer | partially correct | partly correct | partly right"
        " | only partially correct | half right | doubtful | a poor choice | a bad choice | a wrong choice"
        " | a poor fit | a poor match | a distractor | a trap"
        " | distractor | trap | a red herring | the wrong answer | the wrong choice"
        " | the wrong option | an incorrect answer | an incorrect option | the least likely | least likely"
        " | the least probable | the worst | one of the options | one of the possibilities"
        " | one of several possibilities"
    ),
    "{x} is {p} {y}.": (
        "less likely than | less probable than | less typical than | worse than | less consistent than"
    ),
    "- {x}: {p}\n- {y}: ✓": "✗ | ✘ | ❌ | ✖",
    "{x} ist {p}. Es ist {y}.": "falsch | ausgeschlossen | unwahrscheinlich",
    "{x} {p}. Es ist {y}.": "trifft nicht zu | stimmt nicht | kommt nicht in frage | scheidet aus | fehlt | fehlen",
    "{x} est {p}. C'est {y}.": "faux | fausse | incorrecte | exclu | exclue | improbable | peu probable",
    "{x} es {p}; {y} es correcta.": "incorrecta | incorrecto | falsa | falso | errónea | descartada | improbable",
    "{x} é {p}; {y} é correta.": "incorreta | incorreto | errada | errado | descartada | improvável",
    "{x} – {p}, {y} – верно.": (
        "неверно | неправильно | исключено | исключён | неправильный | маловероятно | не видно | не выявлено"
    ),
    "{x}{p}，{y}正确。": "错 | 错误 | 是错误的 | 不正确 | 是不正确的 | 不对 | 不符合 | 不是正确答案",
    "{x}{p}，答案是{y}。": "被排除 | 可以排除 | 可排除",
    "{x}{p}、{y}です。": (
        "ではなく | ではない | ではありません | じゃない | でなく | は誤り | は見られません"
        " | は見られない | は認めません | は認められません | は認められない | はありません | は間違い"
        " | は除外 | 以外 | はない | なし | の所見はない | の所見はありません | の所見なし"
    ),
    "{x}{p} {y}입니다.": "가 아니라 | 이 아니라 | 가 아니고 | 이 아니고 | 는 틀렸고 | 은 틀렸고",
    "{x}{p}. {y}입니다.": (
        "가 아닙니다 | 이 아닙니다 | 는 아닙니다 | 은 아닙니다 | 제외 | 는 보이지 않습니다 | 은 보이지 않습니다"
        " | 이 보이지 않습니다 | 가 보이지 않습니다 | 는 없습니다 | 은 없습니다 | 이 없습니다 | 가 없습니다"
        " | 없음 | 소견 없음 | 소견은 없습니다 | 소견이 없습니다"
    ),
}
DENIES: Lines = {  # what follows
    "It is {p} {x}; it is {y}.": (
        "not | no | none | nothing | hardly | never | neither | nor | without | rather than | instead of | other than"
        " | anything but"
        " | no sign of | no evidence of | unlike | as opposed to | nothing like | far from | inconsistent with"
        " | not consistent with"
    ),
    "The image {p} {x}. It is {y}.": (
        "is negative for | is free of | lacks | rules out | excludes | fails to show | fails to demonstrate"
    ),
    "{p} {x}. It is {y}.": (
        "unlikely to be | unlikely that it's | unlikely that it is | insufficient evidence for | little evidence for"
        " | negative for | free of | clear of | no signs of | no features of | no indication of"
        " | nothing to suggest | nothing suggests | nothing to support | nothing points to | no reason to suspect"
        " | wrong to choose | wrong to pick | a mistake to choose | refuse to choose | refuse to pick"
        " | if it were | if it was | if this were | if this was | had it been | had this been | were this | were it"
        " | if the answer was | if the answer were | if the diagnosis were | cannot identify any | can't identify any"
        " | unable to identify any | am unable to identify any | am not able to identify any"
    ),
    "{p} it is {x}. It is {y}.": "whether | i doubt | i doubt that | i don't think | i do not think | i don't believe",
    "{y} {p} {x}.": "beats | outweighs | trumps | is better than | makes more sense than | is more likely than",
    "{p} {x}, {y} explains it.": "contrary to | in contrast to | in contrast with | different from",
    "I {p} {x} to {y}.": (
        "change my answer from | changed my answer from | am changing my answer from | switch from | would switch from"
        " | changed from"
    ),
    "{y} fits better {p} {x}.": "than | rather than | compared to | compared with",
    "We can {p} {x}. It is {y}.": (
        "exclude | reject | rule out | eliminate | dismiss | discard | ignore | cross out | cross off | strike"
        " | strike out | set aside"
    ),
    "{p} {x}, it is {y}.": "excluding | ruling out | eliminating | rejecting",
    "{p} {x}.": (
        "everything but | all but | anything except | everything except | all except | except"
        " | everything apart from | all apart from | everything except for | all except for"
    ),
    "This argues {p} {x}. It is {y}.": "against",
    "{p}: {x}. Correct: {y}.": (
        "excluded | ruled out | incorrect | wrong | incorrect options | incorrect answers | not"
    ),
    "{p} {x}, sondern {y}.": "nicht | kein | keine | keinen | statt | anstatt",
    "{p} {x}. Es ist {y}.": "weder | ausser | außer | ohne",
    "{p} {x}, mais {y}.": (
        "pas | ni | aucun | aucune | plutôt que | au lieu de | sans | sauf | ce n'est pas | n'est pas"
        " | absence de | absence d'"
    ),
    "{p} {x} sino {y}.": "no | ni | no es | en lugar de | en vez de | excepto | ningún | ninguna | tampoco"
    " | sin | ausencia de",
    "{p} {x}, mas {y}.": "não | nem | não é | em vez de | exceto | nenhum | nenhuma | sem | ausência de",
    "{p} {x}, а {y}.": "не | ни | нет | вместо | кроме | это не",
    "{p}{x}，而是{y}。": (
        "不应选 | 不该选 | 不能选 | 未见 | 未发现 | 未显示 | 没有发现 | 不是 | 并非 | 不选 | 并不是 | 非"
        " | 不考虑 | 不支持 | 不提示"
    ),
    "{p}{x}，选{y}。": "排除 | 可以排除 | 除了 | 没有 | 无",
}
ABSENT: Lines = {  # the same, unless it is what something is inferred from
    "It shows {p} {x}; it is {y}.": "absence of | the absence of | lack of | the lack of",
}
FAILS: Lines = {  # of what stands before, and what follows
    "{x} {p} fit. It is {y}.": (
        "cannot | can't | does not | doesn't | did not | didn't | could not | couldn't | would not | wouldn't"
        " | should not | shouldn't | isn't | wasn't | won't | can not | has not | hasn't | must not | never"
    ),
    "{x} {p} passen. Es ist {y}.": "kann nicht | passt nicht",
}
FAIL: Lines = {  # the same, of several
    "{x} {p} fit. It is {y}.": "do not | don't | are not | aren't | were not | weren't | have not | haven't",
}
ASSURES: Lines = {  # no denial, reason or choice, although it sounds like one
    "{p} it is {y}.": (
        "no doubt | there is no doubt that | there is no doubt | there's no doubt | i have no doubt"
        " | without doubt | without a doubt | without any doubt | beyond doubt | doubtless | no question"
        " | not surprisingly | i do not doubt | i don't doubt | i do not doubt that | i don't doubt that"
        " | of course | needless to say | no wonder"
    ),
    "It {p} {y}.": (
        "cannot be anything but | can't be anything but | can not be anything but | can only be | can only be the"
    ),
    "It is {p} {y}.": "none other than | nothing but | nothing other than | no other than",
    "It {p} the {y}.": "cannot be anything other than | can't be anything other than",
    "I {p}: {y}": "choose between them | choose from them | have to choose one of them | pick one of these",
    "{p} {y}.": "not only | not just",
    "There is no finding {p} {x}; it is {y}.": "such as",
    "{p} shows {y}.": "pas stain | pas staining | sem image | sem images",
    "The image is a {y}. {x} is {p}.": "more accurate",
}
HEDGES: Lines = {
    "{p} {x}, but the answer is {y}.": (
        "maybe | perhaps | possibly | conceivably | torn between | i'm torn between | between | at first"
        " | at first glance | at first sight | initially | i first thought | my first thought was"
        " | i was tempted by | it resembles | i considered | consider | considering | one might think"
        " | differential | differential includes | differential diagnosis | second choice | similar to"
    ),
    "{p} {x}, but {y} fits better.": "i was going to say | i was inclined to say | i was leaning towards",
    "{p} choose {x}, but the right answer is {y}.": (
        "people often | many people | many would | some might | some would | students often | one might | you might"
        " | it is tempting to | it's tempting to | a common mistake is to | a common error is to"
    ),
    "{p}, but {y}.": "i am not sure | i'm not sure | not sure | unsure | i am not certain | i'm not entirely certain",
    "{p}; {y}": "not entirely sure | i'm not entirely sure | i am not entirely certain | not certain | hard to say",
    "It is {y}, though {x} {p}.": (
        "is possible | is also possible | remains possible | cannot be excluded | can't be excluded"
    ),
    "It is {y}, while {x} {p}.": "cannot be ruled out | can't be ruled out | is a possibility | not excluded",
    "{p} {x}, aber die Antwort ist {y}.": "vielleicht | möglicherweise | eventuell",
    "{p} {x}, mais la réponse est {y}.": "peut-être | éventuellement",
    "{p} {x}, pero la respuesta es {y}.": "quizás | quizá | tal vez | posiblemente",
    "{p} {x}, mas a resposta é {y}.": "talvez | possivelmente",
    "{p} {x}, но ответ: {y}.": "возможно | может быть | пожалуй",
    "{p}{x}，但答案是{y}。": "可能 | 可能是 | 也许 | 也许是 | 或许",
    "{p}{x}、しかし答えは{y}です。": "もしかすると | ひょっとすると",
    "{p} {x}, 하지만 정답은 {y}입니다.": "아마 | 어쩌면",
}
BESIDES: Lines = {  # says that it is there too, with what the sentence says else
    "The image is clean {p} {y}.": "apart from | aside from | except for | besides | in addition to",
}
IFS: Lines = {  # a refusal that goes on "if …" still refuses
    "I cannot see the image. {p} it is dark, choose {x}.": "if",
}
MIGHT: Lines = {
    "It {p} {x}, but the answer is {y}.": (
        "might be | may be | could be | can be | could also be | might | could | may"
    ),
}
RETRACTS: Lines = {  # takes back what was said before it
    "The answer is {x}. {p}: {y}": (
        "scratch that | strike that | correction | i made a mistake | i made an error | that is wrong"
        " | that's wrong | that was wrong | that is incorrect | that's incorrect | that is not right"
        " | that's not right | this is wrong | i take that back | my mistake | my bad | i meant | i mean"
        " | make that | or rather | no , that is wrong | no , that's wrong | that was a mistake | i was wrong"
        " | i was mistaken | i stand corrected | i need to correct myself"
        " | i must correct myself | i have to correct myself | let me correct myself | let me correct that | i misread"
        " | i misspoke"
    ),
    "Die Antwort ist {x}. {p}: {y}": "korrektur | ich korrigiere mich | ich meinte",
    "La réponse est {x}. {p} : {y}": "correction | je me corrige | je voulais dire",
    "La respuesta es {x}. {p}: {y}": "corrección | me corrijo | quise decir",
    "A resposta é {x}. {p}: {y}": "correção | corrijo-me | quis dizer",
    "Ответ: {x}. {p}: {y}": "поправка | исправляюсь | точнее",
    "答案是{x}。{p}：{y}": "更正 | 我错了 | 说错了 | 改为 | 改选",
    "答えは{x}です。{p}：{y}": "訂正 | 間違えました",
    "정답은 {x}입니다. {p}: {y}": "정정 | 정정합니다",
}
DOUBTS: Lines = {  # may take back what was said before it, if something is said after it
    "The answer is {x}. {p}, the answer is {y}.": (
        "wait | hold on | actually | hmm | hm | on second thought | on second thoughts | on reflection | oops"
        " | sorry | no wait | upon closer look | upon closer inspection | on closer inspection | looking closer"
        " | looking again | but wait | let me reconsider | let me think again | let me double check"
        " | let me double-check | let me re-examine | let me check again | let me look again | upon reflection"
        " | upon further reflection | in fact | thinking again | i changed my mind | i change my mind"
    ),
    "The answer is {x}. {p} the answer is {y}.": "well , | no , | no . | no : | no ! | no ; | no - | no – | no —",
    "Die Antwort ist {x}. {p} die Antwort ist {y}.": "moment | warte | halt | nein , | doch , | eigentlich",
    "La réponse est {x}. {p} la réponse est {y}.": "attendez | en fait | non , | pardon",
    "La respuesta es {x}. {p} la respuesta es {y}.": "espera | en realidad | perdón | no , ",
    "A resposta é {x}. {p} a resposta é {y}.": "espere | na verdade | desculpe | não ,",
    "Ответ: {x}. {p} ответ: {y}.": "подождите | подожди | на самом деле | нет ,",
    "答案是{x}。{p}答案是{y}。": "等等 | 等一下 | 不对 , | 不 ,",
    "答えは{x}です。{p}答えは{y}です。": "待って | いや 、 | いいえ 、",
    "정답은 {x}입니다. {p} 정답은 {y}입니다.": "잠깐 | 아니 ,",
}
CONTRASTS: Lines = {  # begins a clause that a denial does not reach
    "It is not {x}, {p} {y}.": "but | however | yet | instead",
    "It is not {x}, {p} it is {y}.": "although | though | whereas | on the other hand | rather",
    "Nicht {x}, {p} {y}.": "sondern | aber | jedoch",
    "Pas {x}, {p} {y}.": "mais | cependant",
    "No es {x}, {p} {y}.": "sino | pero | sino que | sin embargo",
    "Não é {x}, {p} {y}.": "mas | mas sim | porém",
    "Не {x}, {p} {y}.": "а | но | однако",
    "不是{x}，{p}{y}。": "而是 | 但 | 但是 | 而",
    "{x}ではない。{p}{y}です。": "しかし | むしろ",
    "{x}가 아닙니다. {p} {y}입니다.": "하지만 | 그러나",
}
REASONS: Lines = {
    "{y}, {p} {x} shows less.": "because | since | as the | as it | as this | as there | as we | as",
    "{y}. {p} {x} shows less.": "besides , | apart from that , | aside from that , | in addition to that ,",
    "{y} {p} the dark rim.": "due to | because of | given | based on | owing to",
    "{y}, {p} {x} zeigt weniger.": "weil | denn",
    "{y}, {p} {x} montre moins.": "car | parce que | puisque",
    "{y}, {p} {x} muestra menos.": "porque | ya que | puesto que",
    "{y}, {p} {x} mostra menos.": "pois | já que | uma vez que",
    "{y}, {p} {x} меньше.": "потому что | так как | поскольку",
    "{y}，{p}{x}较少。": "因为 | 由于",
}
REFUSES: Lines = {
    "I {p} whether it is {x}.": (
        "cannot determine | can't determine | could not determine | am unable to determine"
        " | am not able to determine | cannot tell | can't tell | cannot say | can't say | cannot identify"
        " | can't identify | cannot decide | can't decide | cannot diagnose | can't diagnose | cannot provide"
        " | can't provide | cannot answer | can't answer | cannot interpret | can't interpret | cannot analyze"
        " | can't analyze | cannot analyse | cannot assess | can't assess | cannot help | can't help"
        " | cannot assist | can't assist | cannot comment | can't comment | cannot view | can't view"
        " | do not know | don't know | am unable to tell | am unable to identify | am unable to diagnose"
        " | am unable to provide | can not determine | am unable to answer | am unable to assist"
        " | am unable to help | am unable to view | am unable to interpret | have no idea | cannot see the image"
        " | can't see the image | cannot see any image | can't see any image | cannot make out"
        " | am not able to tell | am not able to identify | am not able to diagnose | am not able to provide"
        " | can not tell | am not able to answer | am not able to help | am not able to assist"
        " | cannot accurately determine | cannot confidently say"
    ),
    "It {p}.": (
        "cannot be determined | can't be determined | could not be determined | cannot be identified"
        " | cannot be answered | cannot be diagnosed | cannot be said"
    ),
    "It is {p}.": (
        "impossible to tell | impossible to determine | impossible to say | not possible to tell"
        " | not possible to determine | not possible to say | impossible to identify | not possible to identify"
        " | impossible to answer | not possible to answer"
    ),
    "{p} this.": (
        "unable to determine | unable to tell | unable to identify | unable to answer | unable to diagnose"
        " | unable to help | unable to assist | unable to view | unable to interpret | unable to provide"
        " | not able to determine | not able to diagnose | not able to identify | not able to provide"
        " | not able to interpret | not able to answer | not able to help | not able to assist | not able to tell"
        " | cannot give medical advice | can't give medical advice"
    ),
    "There is {p}.": "not enough information | insufficient information | no image | image not provided",
    "{p}, this is for a doctor.": "as an ai | i'm sorry , but i can't | i am sorry , but i cannot | i'm just an ai",
    "{p}, the image is dark.": (
        "no idea | no clue | no answer | no clear answer | no right answer | no comment | no opinion"
        " | no information available | no way to tell | no way to know | no one can tell | no diagnosis possible"
    ),
    "{p}.": (
        "das kann ich nicht beurteilen | ich kann nicht | ich weiss nicht | ich weiß nicht | nicht bestimmbar"
        " | je ne peux pas | je ne sais pas | impossible à déterminer | no puedo | no sé | no se puede determinar"
        " | não posso | não sei | não é possível determinar | я не могу | не могу | не знаю"
        " | невозможно определить"
    ),
    "{p}。": "无法 | 抱歉 | 我不知道 | 不能确定 | 无法确定 | 分かりません | わかりません | できません | 申し訳",
    "{p}": "모르겠습니다 | 알 수 없습니다 | 할 수 없습니다 | 죄송",
}
NONE_OF_THEM: Lines = {
    "{p}": "none of the above | none of these | none of them | none of the options | none of the given options",
}
ALL_OF_THEM: Lines = {
    "{p}": "all of the above | all of these | all of them | all the above | both of them",
}
AND: Lines = {
    "{y} {p} {y}": "and | and also | as well as | und | sowie | et | ainsi que | и | & | plus",
    "{y}{p}{y}": "も | 和 | 与 | と | 및 | 와 | 과 | 、",
}
WITH: Lines = {  # joins two options, where nothing more is said of the second
    "It shows {y} {p} {y}.": (
        "with | together with | along with | accompanied by | associated with | complicated by | on"
    ),
}
OR: Lines = {
    "{y} {p} {y}": "or | nor | vs | versus | oder | noch | ou | или | либо | and / or",
    "{y}{p}{y}": "或 | 或者 | 还是 | か | 또는 | 이나",
}
OVER: Lines = {
    "I choose {y} {p} {x}": "over",
}
TO: Lines = {
    "I prefer {y} {p} {x}": "to",
}
NAMES: Lines = {  # a letter after them is a part of a name
    "{p} {x} is seen. Answer: {y}": (
        "vitamin | hepatitis | influenza | type | class | group | phase | category | level | zone | segment"
        " | lead | panel | figure | fig | factor | protein | subtype | haemophilia | hemophilia | part | grade"
        " | stage | vitamine | gruppe"
    ),
}
NAMES_AFTER: Lines = {
    "{x}{p}。答案是{y}。": "型 | 超 | 期 | 级 | 級 | 线 | 線 | 细胞 | 細胞 | 族 | 反应",
}
VERBS: Lines = {
    "{y} {p} the image.": (
        "fit | both fit | match | both match | fits | matches | shows | represents | describes | depicts"
        " | explains | remains | stands out in"
        " | applies to | agrees with | makes sense of | suits | has | gives | appears in"
    ),
    "It is {y} {p}.": "for sure | for certain | here | in this case | in this image | all the way",
    "It is not {x}; {y} {p}.": "does",
    "{x} zeigt weniger. Ich würde {y} {p}.": "wählen | nehmen",
}
IS: Lines = {
    "{x} shows less. {y} {p} correct.": (
        "is | seems | appears | looks | would be | should be | will be | appears to be | seems to be | has to be"
        " | sounds | is certainly | is clearly | is definitely | is probably | is likely"
    ),
    "{x} zeigt weniger. {y} {p} richtig.": "ist | wäre | scheint | lautet",
    "{x} montre moins. {y} {p} correct.": "est | serait | semble",
    "{x} muestra menos. {y} {p} correcta.": "es | sería | parece",
    "{x} mostra menos. {y} {p} correta.": "é | seria",
    "{x} меньше. {y} {p} верный ответ.": "является",
}
ARE: Lines = {
    "{y} and {y} {p} correct.": (
        "are both | are equally | seem | seem both | appear | look | are | were | sind | sont | son | são"
    ),
}
ARTICLES: Lines = {
    "The answer is {p} {y}.": (
        "the | an | der | die | das | ein | eine | le | la | les | un | une | el | los | las | os | um | uma"
        " | simply | just | that"
    ),
}
PRONOUNS: Lines = {
    "It is not {x}, {p} shows {y}.": "it | this | we | we're | we are | i'm | he | she | they | one",
}

NO_CUES: Lines = {  # what the options are called, that no colon makes a declaration
    "Let us look at {p}: {x} is wrong. It is {y}.": (
        "each option | every option | each choice | every choice | each answer choice | each answer"
    ),
}

TABLES: dict[str, Lines] = {
    "D": DECLARES, "K": CUES, "k": CUES_TO, "I": STATES, "S": CONCLUDES, "f": FINAL, "G": ACCEPTS, "Z": REJECTS,
    "N": DENIES, "X": FAILS, "Y": FAIL, "w": ASSURES, "H": HEDGES, "h": MIGHT, "R": RETRACTS, "r": DOUBTS,
    "b": CONTRASTS, "B": REASONS, "F": REFUSES, "U": NONE_OF_THEM, "A": ALL_OF_THEM, "J": AND, "O": OR, "z": OVER,
    "V": NAMES, "v": NAMES_AFTER, "P": VERBS, "Q": IS, "E": ARE, "a": ARTICLES, "p": PRONOUNS,
    "e": NO_CUES, "M": WITH, "d": PREFERS, "g": RIGHT, "i": IFS, "o": TO, "m": INFERS,
    "s": ABSENT, "x": BESIDES,
}  # fmt: skip
"""By the character that a phrase becomes. Where a phrase stands in two tables, the first of them counts."""

_PIECE = re.compile(
    rf"(?P<text>[{TEXT}{LOWER_TEXT}{WEAK_TEXT}])"
    rf"|(?P<number>\d+(?:[.,/:]\d+)*[^\W_{CJK}가-힣]*)"
    rf"|(?P<cjk>[{CJK}]|[가-힣]+)"
    rf"|(?P<word>[^\W_{CJK}가-힣]+(?:['‐‑-][^\W_{CJK}가-힣]+)*)"
    r"|(?P<sign>\.{2,}|°\s?[^\W\d_](?!\w)|[^\s_])|(?P<newline>\n)"
)


class Piece(NamedTuple):
    kind: str
    text: str
    """In lower case, but for a letter that stands alone."""
    capital: bool


LETTER = "·"
"""Any single letter in a phrase ("i choose", "is a possibility"): a phrase cannot tell which letter it has."""


def split(text: str) -> Iterator[Piece]:
    """Words, numbers, signs and placeholders of option texts, in order."""
    for match in _PIECE.finditer(text):
        piece = match[0]
        kind = match.lastgroup or ""
        if kind == "word" and len(piece) == 1 and piece.isascii():
            yield Piece("letter", piece, piece.isupper())
        else:
            yield Piece(kind, piece.lower(), piece[:1].isupper())


def phrases(lines: Lines) -> Iterator[tuple[str, str]]:
    """(example, phrase) of a table."""
    for example, several in lines.items():
        for phrase in several.split(" | "):
            yield example, phrase.strip()


END = ""
"""Where a phrase ends in a `tree`; no piece of a text is empty."""


def tree(tables: Mapping[str, Lines]) -> dict[str, Any]:
    """All phrases of tables, word by word; a phrase's character at END."""
    root: dict[str, Any] = {}
    for character, lines in tables.items():
        for _, phrase in phrases(lines):
            node = root
            for piece in split(phrase):
                node = node.setdefault(LETTER if piece.kind == "letter" else piece.text, {})
            node.setdefault(END, character)
    return root


def words_of(pieces: Iterable[Piece]) -> list[str]:
    """Pieces as a `tree` has them."""
    return [LETTER if piece.kind == "letter" else piece.text for piece in pieces]


def phrase_at(root: dict[str, Any], words: Sequence[str], position: int) -> tuple[str, int]:
    """Character and length in words of the longest phrase of a `tree` that begins there; "" and 0 without one."""
    node, character, length = root, "", 0
    for place in range(position, len(words)):
        if words[place] not in node:
            break
        node = node[words[place]]
        if END in node:
            character, length = node[END], place + 1 - position
    return character, length


TREE = tree(TABLES)
