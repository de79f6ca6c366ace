// Elements, and lists of them that change little: what the dashboard's other parts are made of.

// An element with attributes, properties (those that start with a dot) and children.
function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith(".")) node[name.slice(1)] = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

// Make `parent`'s children those of `items`, by key, changing only what differs: a button keeps
// its focus, and a selection survives, while rows around it come and go.
function reconcile(parent, items, keyOf, make, update) {
  const old = new Map([...parent.children].map((node) => [node.dataset.key, node]));
  // Who is gone goes first: those that stay then need no moving, which would take their focus.
  const keys = new Set(items.map((item) => String(keyOf(item))));
  for (const [key, node] of old) if (!keys.has(key)) node.remove();
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let node = old.get(key);
    if (!node) {
      node = make(item);
      node.dataset.key = key;
    }
    update(node, item);
    if (node === place) place = place.nextElementSibling;
    else parent.insertBefore(node, place);
  }
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
