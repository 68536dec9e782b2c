// A signal, some cycles later; zero after a reset.
module delay #(
  parameter CYCLES = 1
) (
  input wire clk,
  input wire rst,
  input wire in,
  output wire out
);
  reg [CYCLES-1:0] line;
  wire unused_oldest;
  wire [CYCLES-1:0] next;
  assign {unused_oldest, next} = {line, in};
  always @(posedge clk) line <= rst ? 0 : next;
  assign out = line[CYCLES-1];
endmodule
