"use strict";
// Tables sort by a click on a column's head and filter by a word; without this script they are read as they stand.
(function () {
  var MANY = 12;

  function worth(row, column) {
    var cell = row.cells[column];
    var first = cell.querySelector(".figure") || cell.firstChild;
    return (first ? first.textContent : "").trim().replace("\u2212", "-").replace(/,(?=\d{3})/g, "");
  }

  function compare(one, other) {
    var a = parseFloat(one), b = parseFloat(other);
    if (isNaN(a) && isNaN(b)) { return one.localeCompare(other); }
    if (isNaN(a)) { return 1; }
    return isNaN(b) ? -1 : b - a;
  }

  function sort(table, head, column) {
    var again = head.getAttribute("aria-sort") === "descending";
    table.querySelectorAll("[aria-sort]").forEach(function (other) { other.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", again ? "ascending" : "descending");
    var body = table.tBodies[0];
    var rows = Array.from(body.rows).filter(function (row) { return !row.classList.contains("unpruned"); });
    rows.sort(function (one, other) {
      var order = compare(worth(one, column), worth(other, column));
      return again ? -order : order;
    });
    rows.forEach(function (row) { body.appendChild(row); });
  }

  function sortable(table) {
    var heads = table.tHead.rows[table.tHead.rows.length - 1].cells;
    Array.from(heads).forEach(function (head, column) {
      if (!head.textContent.trim()) { return; }
      var button = document.createElement("button");
      button.type = "button";
      while (head.firstChild) { button.appendChild(head.firstChild); }
      head.appendChild(button);
      button.addEventListener("click", function () { sort(table, head, column); });
    });
  }

  function filtered(table) {
    var label = document.createElement("label"), input = document.createElement("input");
    var count = document.createElement("span");
    label.className = "filter";
    input.type = "search";
    input.placeholder = "Filter rows";
    input.setAttribute("aria-label", "Filter rows");
    count.setAttribute("aria-live", "polite");
    label.append(input, count);
    table.parentNode.parentNode.insertBefore(label, table.parentNode);
    input.addEventListener("input", function () {
      var words = input.value.toLowerCase().split(/\s+/).filter(Boolean), shown = 0;
      var rows = Array.from(table.tBodies[0].rows);
      rows.forEach(function (row) {
        var text = row.textContent.toLowerCase();
        row.hidden = !words.every(function (word) { return text.includes(word); });
        shown += row.hidden ? 0 : 1;
      });
      count.textContent = words.length ? shown + " of " + rows.length : "";
    });
  }

  document.querySelectorAll(".scroll > table").forEach(function (table) {
    if (!table.tHead || table.tBodies[0].rows.length < 2) { return; }
    sortable(table);
    if (table.tBodies[0].rows.length > MANY) { filtered(table); }
  });
  var closed = [];
  window.addEventListener("beforeprint", function () {
    closed = Array.from(document.querySelectorAll("details:not([open])"));
    closed.forEach(function (one) { one.open = true; });
  });
  window.addEventListener("afterprint", function () { closed.forEach(function (one) { one.open = false; }); });
})();
