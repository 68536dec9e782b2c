// Adds up the bit-planes of a pixel, most significant first: the sum doubles at each beat. At the last beat the sum is
// handed over, and the next begins at zero. `last` is set in a valid beat only.
module accumulate #(
  parameter WIDTH = 9
) (
  input wire clk,
  input wire clear,           // with `last`, and in a reset; a register of its own, as it goes to every sum
  input wire valid,
  input wire last,
  input wire [WIDTH-1:0] count,
  output reg [WIDTH-1:0] sum
);
  reg [WIDTH-1:0] so_far;
  wire [WIDTH-1:0] now = (so_far << 1) + count;
  always @(posedge clk) begin
    if (clear) so_far <= 0;
    else if (valid) so_far <= now;
    if (last) sum <= now;
  end
endmodule
