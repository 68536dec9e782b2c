'use strict';
// Tables that a click on a heading sorts: numbers as numbers, and cells without a value last.

function keyOf(row, column) {
  const cell = row.cells[column];
  const text = cell.dataset.value === undefined ? cell.textContent.trim() : cell.dataset.value;
  if (text === '' || text === '-' || text === 'nan') return null;
  return Number.isNaN(Number(text)) ? text : Number(text);
}

function compared(a, b) {
  if (typeof a === 'number' && typeof b === 'number') return a - b;
  return String(a).localeCompare(String(b), undefined, {numeric: true});
}

function sortBy(table, column) {
  const heads = [...table.tHead.rows[0].cells], head = heads[column];
  const down = head.getAttribute('aria-sort') === 'ascending';
  heads.forEach(h => h.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const rows = [...table.tBodies[0].rows].map(row => [keyOf(row, column), row]);
  const given = rows.filter(([key]) => key !== null).sort((a, b) => (down ? -1 : 1) * compared(a[0], b[0]));
  table.tBodies[0].append(...[...given, ...rows.filter(([key]) => key === null)].map(([, row]) => row));
}

for (const table of document.querySelectorAll('table.sortable')) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.querySelector('button').addEventListener('click', () => sortBy(table, column));
  });
}
