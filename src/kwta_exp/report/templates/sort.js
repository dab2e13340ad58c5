"use strict";
// A click on a column's button, or Enter or Space on it, sorts the rows by that column; again, the other way round.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const header = button.closest("th");
    const body = header.closest("table").tBodies[0];
    const column = header.cellIndex;
    const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const compare = (a, b) => {
      const [first, second] = [key(a), key(b)];
      if (first === "" || second === "") return (first === "") - (second === "");  // empty cells stay last
      const [x, y] = [Number(first), Number(second)];
      const order = Number.isNaN(x) || Number.isNaN(y) ? first.localeCompare(second) : x - y;
      return direction * order;
    };
    body.append(...[...body.rows].sort(compare));
    for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
  });
}
