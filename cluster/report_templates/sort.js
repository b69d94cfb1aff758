"use strict";
// Headings of the table become buttons that sort it. Without this script the table is in its first order.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const falls = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", falls ? "descending" : "ascending");
      const value = (row) => {
        const cell = row.cells[column];
        if (!heading.classList.contains("number")) return cell.textContent;
        return cell.dataset.sort ? Number(cell.dataset.sort) : null;
      };
      const compare = (left, right) => {
        const [a, b] = [value(left), value(right)];
        if (a === null || b === null) return (a === null) - (b === null); // what is missing stays last
        const order = typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
        return falls ? -order : order;
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
