"use strict";
(function () {
  const table = document.getElementById("cases"), body = table.tBodies[0], find = document.getElementById("find");
  const buttons = [...table.tHead.querySelectorAll("button")];
  const text = (row, column) => row.cells[column].textContent.trim();
  const naturally = new Intl.Collator("en", { numeric: true }).compare;

  buttons.forEach((button, column) => button.addEventListener("click", () => {
    const heading = button.parentElement, down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of buttons) other.parentElement.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const number = heading.classList.contains("number");
    const rows = [...body.rows].sort((a, b) => {
      const [left, right] = [text(a, column), text(b, column)];
      if (!left || !right) return (left ? 0 : 1) - (right ? 0 : 1); // what has no value goes last, either way
      return (number ? left - right : naturally(left, right)) * (down ? -1 : 1);
    });
    body.append(...rows);
  }));

  function filter() {
    const wanted = find.value.toLowerCase();
    let shown = 0;
    for (const row of body.rows) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
      shown += !row.hidden;
    }
    document.getElementById("shown").textContent = wanted ? `${shown} of ${body.rows.length}` : "";
  }
  find.addEventListener("input", filter);
  document.body.dataset.ready = "yes";
})();
