// A queue in memory, between two layers. What is read from memory, which is slow, goes to a register of its own before it
// goes out. `room` says that at least SPARE more values fit. The layer before it stops in time by `room`, so its arithmetic
// never has to wait.
module fifo #(
  parameter WIDTH = 8,
  parameter DEPTH = 64,  // a power of two
  parameter SPARE = 16
) (
  input wire clk,
  input wire rst,
  input wire [WIDTH-1:0] in_data,
  input wire in_valid,
  output reg room,
  output reg [WIDTH-1:0] out_data,
  output reg out_valid,
  input wire out_ready
);
  localparam BITS = $clog2(DEPTH);
  (* no_rw_check *) reg [WIDTH-1:0] memory [0:DEPTH-1];  // never reads and writes at one place
  reg [BITS-1:0] writing, reading;
  reg [BITS:0] held;         // values in memory
  reg [WIDTH-1:0] next;      // the value behind out_data
  reg next_valid;
  reg some;                  // held is not zero
  wire move = ~out_valid | out_ready;
  wire take = (~next_valid | move) & some;
  // One more, one less, or as many as before: the change as a signed number.
  wire [BITS:0] change = {{BITS{take & ~in_valid}}, take ^ in_valid};

  always @(posedge clk) begin
    if (in_valid) memory[writing] <= in_data;
    if (take) next <= memory[reading];
    if (move) out_data <= next;
    if (rst) begin
      writing <= 0;
      reading <= 0;
      held <= 0;
      some <= 1'b0;
      next_valid <= 1'b0;
      out_valid <= 1'b0;
      room <= 1'b0;
    end else begin
      if (in_valid) writing <= writing + 1'b1;
      if (take) reading <= reading + 1'b1;
      held <= held + change;
      some <= in_valid | held > 1 | (held == 1 & ~take);
      next_valid <= take | (next_valid & ~move);
      out_valid <= next_valid | (out_valid & ~out_ready);
      room <= held <= DEPTH - SPARE;
    end
  end
endmodule
