// Finds the level of a sum, most significant bit first, in BITS cycles: each compares the sum with the threshold in the
// middle of the levels that are left (successive approximation).
//
// The thresholds are a tree: node 1 is the middle, and nodes 2n and 2n + 1 are the middles below and above node n. The
// threshold of a node is the least sum that goes to its upper half. THRESHOLDS holds the lowest bits of all nodes'
// thresholds, then the next ones: a bit of a threshold is one small table.
module search #(
  parameter SUM = 9,
  parameter BITS = 4,
  parameter [SUM*(2**BITS)-1:0] THRESHOLDS = 0
) (
  input wire clk,
  input wire start,           // the sum is new after this edge; it stays for BITS cycles
  input wire [SUM-1:0] sum,
  output reg level            // the bits, from two edges after `start` on
);
  reg [BITS-1:0] node;
  wire [SUM-1:0] threshold;
  genvar i;
  generate
    for (i = 0; i < SUM; i = i + 1) begin : column
      localparam [2**BITS-1:0] TABLE = THRESHOLDS[(2**BITS)*i +: 2**BITS];
      assign threshold[i] = TABLE[node];
    end
  endgenerate
  wire upper = sum >= threshold;
  wire unused_top;
  wire [BITS-1:0] below;
  assign {unused_top, below} = {node, upper};
  always @(posedge clk) begin
    level <= upper;
    node <= start ? 1 : below;
  end
endmodule
