// A large heap of maps, arrays and objects, collected several times: compare_heap.js ENTRIES
const count = Number(process.argv[2]);
const entries = new Map();
const pairs = [];
for (let i = 0; i < count; i++) {
  entries.set("key" + i, { number: i, text: "value " + ((i * 7919) % count) });
  pairs.push([i, i + 1]);
}
let sum = 0;
for (let turn = 0; turn < 3; turn++) {
  for (let i = 0; i < count; i += 3) {
    const entry = entries.get("key" + ((i * 31 + turn) % count));
    sum = (sum + entry.number * 3 + entry.text.length) % 1000000007;
    entry.number++;
    pairs[i] = [pairs[i][0] + sum, sum];
  }
}
let hash = 0;
for (const pair of pairs) hash = (hash * 31 + pair[0]) % 1000000007;
console.log(sum, hash);
