// Model text enters the page by textContent only: it can never become markup.
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
const PAGE = 20;
const CHANGES = ["turned right", "turned wrong", "right both times", "wrong both times"];
const byId = id => document.getElementById(id);

function changed(before, after) {
  return CHANGES[before.correct ? (after.correct ? 2 : 1) : (after.correct ? 0 : 3)];
}

function verdict(reply) {
  if (reply.outcome === "letter" || reply.outcome === "text") return reply.correct ? "right" : "wrong";
  return { ambiguous: "several options", refusal: "declined", truncated: "cut off", invalid: "no such option",
           unparsed: "no answer found" }[reply.outcome] ?? reply.outcome;
}

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function replyBox(title, reply) {
  const box = element("div", "reply");
  const head = element("h3", "", title);
  const mark = reply.correct ? "✓ " : "✗ ";
  const letter = reply.letter ? reply.letter + ", " : "";
  head.append(element("span", reply.correct ? "right" : "wrong", mark + letter + verdict(reply)));
  const told = [reply.tokens == null ? "" : reply.tokens + " tokens", reply.finish === "length" ? "cut at the limit" : ""];
  head.append(element("span", "muted", told.filter(Boolean).join(", ")));
  const text = element("pre");
  for (const part of reply.reply.split(/(<\/?(?:think|answer)>)/i))
    if (part) text.append(/^<\/?(think|answer)>$/i.test(part) ? element("span", "tag", part) : part);
  if (!reply.reply) text.append(element("span", "muted", "(empty)"));
  box.append(head, text);
  return box;
}

// A reply that is longer than its box can be scrolled by keyboard too.
function reach() {
  for (const text of document.querySelectorAll(".reply pre")) if (text.scrollHeight > text.clientHeight) {
    text.tabIndex = 0;
    text.role = "region";
    text.ariaLabel = "the reply";
  }
}

function card(s) {
  const box = element("article", "sample");
  const pictures = element("div", "pictures");
  for (const index of s.images) {
    if (images[index]) {
      const image = element("img");
      image.src = images[index];
      image.alt = "image of this question";
      pictures.append(image);
    } else pictures.append(element("span", "", "image not available"));
  }
  if (!s.images.length) pictures.append(element("span", "", "no image"));
  const body = element("div");
  body.append(element("div", "from", [s.modality, s.question_type, s.source, s.id].join(" · ")));
  body.append(element("div", "question", s.question));
  const options = element("ul", "options");
  s.options.forEach((option, index) => {
    const item = element("li");
    item.append(element("span", LETTERS[index] === s.gold ? "gold" : "", LETTERS[index] + ") " + option));
    options.append(item);
  });
  if (!s.options.length) {  // an open question: the right text
    const item = element("li");
    item.append(element("span", "gold", s.gold));
    options.append(item);
  }
  const replies = element("div", "replies");
  for (const [title, reply] of s.shown ?? [["Before", s.before], ["After", s.after]]) replies.append(replyBox(title, reply));
  body.append(options, replies);
  box.append(pictures, body);
  return box;
}
