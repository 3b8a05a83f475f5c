// Images enlarge at a click or Enter: Esc closes, the arrows go on within a gallery. Tables sort by their heads, a box filters their rows.
(() => {
  const box = document.createElement("dialog"), big = document.createElement("img"), told = document.createElement("p");
  box.className = "light";
  box.append(big, told);
  document.body.append(box);
  let shown = [], at = 0;
  const show = (number) => {
    at = (number + shown.length) % shown.length;
    const caption = shown[at].parentElement.querySelector("figcaption");
    big.src = shown[at].src;
    big.alt = shown[at].alt;
    told.textContent = `${at + 1} / ${shown.length}   ${caption ? caption.textContent : ""}`;
  };
  const open = (image) => {
    shown = [...image.closest(".images").querySelectorAll("img")];
    show(shown.indexOf(image));
    box.showModal();
  };
  document.querySelectorAll(".images img").forEach((image) => {
    image.addEventListener("click", () => open(image));
    image.addEventListener("keydown", (event) => event.key === "Enter" && open(image));
  });
  box.addEventListener("click", () => box.close());
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) show(at + step);
  });

  const value = (row, column) => {
    const text = row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
    return text === "-" ? -Infinity : text === "" || isNaN(text) ? text : +text;
  };
  document.querySelectorAll("table.sortable").forEach((table) => {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      head.tabIndex = 0;
      const sort = () => {
        const down = head.getAttribute("aria-sort") !== "descending";
        [...head.parentElement.cells].forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const order = (a, b) => (typeof a === typeof b && a < b) || (typeof a < typeof b) ? -1 : a === b ? 0 : 1;
        const rows = [...table.tBodies[0].rows].sort((a, b) => order(value(a, column), value(b, column)));
        table.tBodies[0].append(...(down ? rows.reverse() : rows));
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
    });
  });
  document.querySelectorAll("input.filter").forEach((input) => {
    const rows = [...input.closest("section").querySelectorAll("tbody tr")], count = input.parentElement.querySelector("output");
    const filter = () => {
      const words = input.value.toLowerCase().split(/\s+/);
      rows.forEach((row) => (row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word))));
      if (count) count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
    };
    input.addEventListener("input", filter);
    filter();
  });
})();
